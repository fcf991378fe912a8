"""dvit-bench: the peers, a sweep, the nodes; and that another function is found out."""

import json
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from any_vit import SIZE
from any_vit import tiny as small_vit
from commands import fails
from golden_cases import official_checkpoint, state_dict
from golden_vits import size_of, write
from stand_ins import StandIns

import dvit_infer as dvit
from dvit_infer.backends import runner_for
from dvit_infer.benchmark import compare, peers
from dvit_infer.benchmark.candidates import Candidate
from dvit_infer.benchmark.compare import Comparison
from dvit_infer.cli import bench

pytestmark = pytest.mark.usefixtures("_empty_folder")
NODE = "op kind runtime model keep_rate dtype batch shape us p20_us p80_us max_error gmacs mib floor_us bound share "
NODE += "saves_us"


def run(model: str, *argv: str) -> list[dict]:
    assert bench.main([model, "--device", "cpu", "--seconds", "0.1", "--json", "rows.json", *argv]) == 0
    return json.loads(Path("rows.json").read_text())["rows"]


@pytest.mark.slow
def test_peers_compute_the_same_function(tiny_lvvit, capsys, monkeypatch):
    """What torch.onnx exports, once, serves both runtimes."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    exports, export = [], peers.traced_onnx
    monkeypatch.setattr(peers, "traced_onnx", lambda *given: exports.append(given) or export(*given))
    rows = run(tiny_lvvit, "--batch", "3,1", "--compare", "sdpa,onnxruntime,openvino")
    names = ["sdpa", "onnxruntime", "openvino", "engine"]
    assert [(row["batch"], row["runtime"]) for row in rows] == [(b, name) for b in (3, 1) for name in names]
    assert len(exports) == 1
    for row in rows:
        assert 0 < row["max_logit_error"] < 2e-4
        assert row["baseline"] == "sdpa"
        assert (row["peak_mib"] is None) == (row["runtime"] in ("onnxruntime", "openvino"))
    out = capsys.readouterr()
    assert out.out.count("all candidates compute the same function") == 2
    assert "by fvcore's count" in out.out
    assert out.err == ""


@pytest.mark.slow
def test_openvino_in_bfloat16(tiny, capsys):
    pytest.importorskip("openvino")
    rows = run(tiny, "--batch", "2", "--compare", "reference,openvino", "--dtype", "bfloat16")
    assert [(row["runtime"], row["dtype"]) for row in rows] == [
        (n, "bfloat16") for n in ("reference", "openvino", "engine")
    ]
    assert all(row["max_logit_error"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_the_owners_code_runs_the_dense_counterpart(package, tiny, capsys, monkeypatch):
    stand_ins = StandIns(monkeypatch)
    dense = {k: v for k, v in official_checkpoint("tiny-deit-r0.7-s1")["model"].items() if "predictor" not in k}
    stand_ins.timm(lambda: dvit.load_reference(dense, assume={"num_heads": 2}))
    stand_ins.transformers("ViTForImageClassification")
    rows = run(tiny, "--batch", "2", "--compare", package)
    assert [(row["runtime"], row["keep_rate"]) for row in rows] == [(package, 1.0), ("engine", 0.7)]
    assert all(row["max_logit_error"] < 1e-4 for row in rows)
    assert rows[0]["params"] < rows[1]["params"]
    assert rows[0]["gmacs"] > rows[1]["gmacs"]
    if package == "transformers":
        stand_ins.factor = 1.01
        assert bench.main([tiny, "--device", "cpu", "--batch", "2", "--seconds", "0.1", "--compare", package]) == 1
        line = "error: not all candidates compute the same function: batch 2: transformers: error "
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "package"),
    [
        ("timm-eva02_tiny_patch14_224-d4-tame", "timm"),
        ("hf-vit-tiny-at-64x128", "transformers"),
        ("hf-dinov2reg-tiny", "transformers"),
    ],
)
def test_the_owners_code_itself(case, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = str(write(case, Path("model")))
    size = "x".join(map(str, size_of(case)))
    rows = run(model, "--batch", "2", "--image-size", size, "--compare", f"{package},{package}-compile")
    names = [(row["runtime"], row["variant"]) for row in rows[-2:]]
    assert names == [(package, None), (package, "compile")]
    assert all(row["max_logit_error"] < 1e-4 for row in rows)


def test_a_way_that_computes_another_function_fails(tiny, capsys, monkeypatch):
    """1% more in one weight of the engine: exit 1, which candidate is named."""
    usual = compare.candidates.engine_candidate

    def spoiled(subject, config, runtime="engine") -> Candidate:
        candidate = usual(subject, config, runtime)
        if runtime == "engine":
            graph = candidate.engine.graph_in(torch.float32)
            graph.nodes[-1].weights["head.weight"].mul_(1.01)
            candidate.engine.runner = runner_for(graph)
        return candidate

    monkeypatch.setattr(compare.candidates, "engine_candidate", spoiled)
    assert bench.main([tiny, "--device", "cpu", "--batch", "2", "--seconds", "0.1"]) == 1
    out = capsys.readouterr()
    assert "NOT the same function" in out.out
    assert out.err.startswith("error: not all candidates compute the same function: batch 2: engine: error ")


@pytest.mark.slow
def test_a_reduced_dtype_hides_no_other_function(tiny_lvvit, capsys, monkeypatch):
    """A near tie that falls the other way costs plain PyTorch as much as a head that is 20% off."""
    usual = compare.candidates.engine_candidate

    def spoiled(subject, config, runtime="engine") -> Candidate:
        candidate = usual(subject, config, runtime)
        graph = candidate.engine.graph_in(torch.bfloat16)
        graph.nodes[-1].weights["head.weight"].mul_(1.2)
        candidate.engine.runner = runner_for(graph)
        return candidate

    argv = [tiny_lvvit, "--device", "cpu", "--batch", "2", "--seconds", "0.1", "--dtype", "bfloat16"]
    assert bench.main([*argv, "--compare", "reference"]) == 0
    monkeypatch.setattr(compare.candidates, "engine_candidate", spoiled)
    assert bench.main([*argv, "--compare", "reference"]) == 1
    assert "engine: rms error" in capsys.readouterr().err


@pytest.mark.slow
def test_every_size_of_batch_is_compiled(monkeypatch):
    """After eight, torch.compile would run the others eagerly and not say so."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs)
        return graph.forward

    model = small_vit("deit", "predictor").reference()
    subject = types.SimpleNamespace(
        plain=model, plain_gmacs=0.0, config=None, device=torch.device("cpu"), compiled_for=0
    )
    usual = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: usual(model, backend=backend, dynamic=dynamic))
    candidate = compare.candidates.compiled_candidate(subject)
    counts = []
    with torch.no_grad():
        for batch in range(1, 11):
            images = torch.zeros(batch, 3, *SIZE)
            assert candidate.call(images).shape == candidate.call(images).shape == (batch, 10)
            counts.append(len(compiled))
    assert counts == sorted(set(counts))


@pytest.mark.slow
def test_what_was_measured_is_shown_when_a_later_batch_fails(tiny, capsys, monkeypatch):
    usual = Comparison.measure

    def measure(self, batch, *rest):
        if batch == 3:
            raise dvit.InputError("batch: 3 images do not fit in memory; use a smaller batch")
        return usual(self, batch, *rest)

    monkeypatch.setattr(Comparison, "measure", measure)
    argv = [tiny, "--device", "cpu", "--batch", "2,3", "--seconds", "0.1", "--json", "x.json"]
    assert bench.main(argv) == 2
    out = capsys.readouterr()
    assert out.out.count(" engine ") == 1
    assert out.err == "error: --batch: 3 images do not fit in memory; use a smaller batch\n"
    assert not Path("x.json").exists()


def test_memory_is_asked_for_before_anything_is_measured(tiny, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.utils.memory.free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(Comparison, "measure", None)
    line = fails(bench, [tiny, "--device", "cpu", "--batch", "1,100000"], capsys)
    assert "--batch: 100000 images do not fit in memory" in line


def test_a_peer_that_fails_is_named_in_one_line(tiny, capsys, monkeypatch):
    def broken(subject):
        raise ValueError("[ONNXRuntimeError] : 9\nmore of it")

    monkeypatch.setitem(compare.CANDIDATES, "onnxruntime", broken)
    line = fails(bench, [tiny, "--device", "cpu", "--compare", "onnxruntime"], capsys)
    assert "onnxruntime cannot run the reference here: [ONNXRuntimeError] : 9" in line


@pytest.mark.slow
def test_a_sweep_measures_every_rate_against_dense(tiny, capsys):
    rows = run(tiny, "--batch", "2", "--sweep", "0.5:0.9:0.2", "--compare", "reference")
    assert [(row["runtime"], row["keep_rate"]) for row in rows] == [
        ("reference", 0.7),
        ("dense", 1.0),
        *(("engine", rate) for rate in (0.5, 0.7, 0.9)),
    ]
    gmacs = [row["gmacs"] for row in rows if row["runtime"] == "engine"]
    assert gmacs == sorted(gmacs)
    assert gmacs[-1] < rows[1]["gmacs"]
    assert all(row["max_logit_error"] < 1e-4 for row in rows)
    assert "98,49,24" in (out := capsys.readouterr().out)
    assert "realised" in out


@pytest.mark.slow
def test_nodes_are_held_against_measured_limits(tiny, capsys):
    rows = run(tiny, "--batch", "100", "--nodes", "--compare", "reference")
    models = [row for row in rows if "op" not in row]
    nodes = [row for row in rows if "share" in row]
    limits = {row["op"]: row for row in rows if "op" in row and "share" not in row}
    engine = next(row for row in models if row["runtime"] == "engine")
    assert all(list(row) == NODE.split() for row in nodes)
    usual = {"op", "runtime", "dtype", "batch", "shape", "us", "max_error"}
    assert [row.keys() - usual for row in limits.values()] == [{"tflops"}, {"gb_per_s"}]
    assert all(usual <= row.keys() for row in limits.values())
    assert [row["kind"] for row in nodes].count("prune") == 3
    assert sum(row["gmacs"] for row in nodes) == pytest.approx(100 * engine["gmacs"])
    assert sum(row["share"] for row in nodes) == pytest.approx(1.0)
    assert all(row["us"] > 0 for row in nodes)
    # The embedding and all but the predictors' scores stand in the reference too.
    assert sum(row["max_error"] is not None and row["max_error"] < 1e-4 for row in nodes) == len(nodes)
    flops, moved = limits["matrix product"]["tflops"] * 1e12, limits["copy"]["gb_per_s"] * 1e9
    for row in nodes:
        least = {"compute": 2 * row["gmacs"] * 1e9 / flops, "memory": row["mib"] * 2**20 / moved}
        assert row["floor_us"] == pytest.approx(max(least.values()) * 1e6)
        assert least[row["bound"]] == max(least.values())
    # Weights are read once for each of the two parts that 100 images are cut into.
    attention = next(row for row in nodes if row["op"] == "blocks.0.attn")
    weights = 4 * (64 * 192 + 192 + 64 * 64 + 64)
    assert attention["mib"] * 2**20 == pytest.approx(100 * 2 * 197 * 64 * 4 + 2 * weights)
    out = capsys.readouterr().out
    assert "measured limits:" in out
    assert "of its floor" in out


@pytest.mark.slow
def test_nodes_of_a_dense_model(tiny):
    state = {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}
    torch.save({"model": state, "args": {"num_heads": 2}}, "dense.pth")
    rows = run("dense.pth", "--batch", "1", "--nodes", "--compare", "reference")
    assert {row["kind"] for row in rows if "share" in row} == {"embed", "attention", "mlp", "head"}
    assert [row["runtime"] for row in rows if "op" not in row] == ["reference", "dense"]


@pytest.mark.slow
def test_a_report_is_written(tiny, capsys):
    rows = run(tiny, "--batch", "1", "--report", "page.html", "--nodes")
    page = Path("page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert all(row["op"] in page for row in rows if "op" in row)
    assert "wrote page.html" in capsys.readouterr().out


@pytest.mark.slow
def test_a_load_is_said(tiny, capsys):
    rows = run(tiny, "--batch", "1", "--compare", "reference", "--load", "1", "--report", "page.html")
    assert [row.pop("load") for row in rows] == [1, 1]
    heading = capsys.readouterr().out.splitlines()[0]
    assert ", beside 1 busy process; speed-up over reference" in heading
    assert ", beside 1 busy process</h1>" in Path("page.html").read_text()
    assert rows[0].keys() == run(tiny, "--batch", "1", "--compare", "reference")[0].keys()
