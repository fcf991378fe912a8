"use strict";

// Charts take their colours from the style sheet, so that they follow the light or dark scheme.
function draw() {
  const style = getComputedStyle(document.documentElement);
  const color = (key, value) =>
    key.endsWith("color") && typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  const figures = JSON.parse(document.getElementById("figures").textContent, color);
  document.querySelectorAll(".chart").forEach((place, index) => {
    const { data, layout } = figures[index];
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
  });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// What is unknown goes last in both directions.
function order(a, b, sign) {
  if (a === b) return 0;
  if (a === "") return 1;
  if (b === "") return -1;
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sortBy(heading) {
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const isNumber = heading.classList.contains("number");
  const key = (row) => {
    const cell = row.children[heading.cellIndex];
    if (!isNumber) return cell.textContent === "-" ? "" : cell.textContent;
    return cell.dataset.value === undefined ? "" : Number(cell.dataset.value);
  };
  const body = heading.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b), sign)));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}
