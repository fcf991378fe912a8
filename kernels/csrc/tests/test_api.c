/* The header is C99, and every wrong argument has its status and a message that names it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dvit_kernels.h"

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      printf("%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, dvit_last_error()); \
      exit(1);                                                                               \
    }                                                                                        \
  } while (0)

enum { B = 2, P = 1, N = 6, C = 64, K = 3 };

static float x[B * (P + N) * C], kept_x[B * (P + K) * C], weights[C * C], score[B * N], workspace[1 << 20];
static int64_t position[B * K];
static const dvit_tokens right = {DVIT_FLOAT32, B, P, N, C, K, (P + N) * C, C};
static const dvit_predictor predictor = {weights, weights, weights, weights, weights,
                                         weights, weights, weights, weights, weights};

static dvit_status prune(const dvit_tokens *shape) {
  return dvit_prune_tokens(shape, &predictor, 1e-5f, x, kept_x, position, workspace, sizeof(workspace), 1);
}

static void refused(dvit_tokens shape, dvit_status status, const char *name) {
  CHECK(prune(&shape) == status);
  CHECK(strstr(dvit_last_error(), name) != NULL);
}

#define REFUSED(field, value, status) \
  do {                                \
    dvit_tokens shape = right;        \
    shape.field = (value);            \
    refused(shape, status, #field);   \
  } while (0)

static void sizes(void) {
  REFUSED(dtype, 3, DVIT_INVALID);
  REFUSED(dtype, -1, DVIT_INVALID);
  REFUSED(batch, -1, DVIT_INVALID);
  REFUSED(batch, INT64_MAX, DVIT_INVALID);
  REFUSED(prefix, -1, DVIT_INVALID);
  REFUSED(tokens, 0, DVIT_INVALID);
  REFUSED(keep, 0, DVIT_INVALID);
  REFUSED(keep, N + 1, DVIT_INVALID);
  REFUSED(channels, 0, DVIT_INVALID);
  REFUSED(channels, 63, DVIT_UNSUPPORTED);
  REFUSED(channels, 2, DVIT_UNSUPPORTED);
  dvit_tokens shape = right;
  shape.batch = (int64_t)1 << 40;
  refused(shape, DVIT_INVALID, "more elements");
  shape = right;
  shape.token_stride = INT64_MIN;
  refused(shape, DVIT_INVALID, "strides");
}

static void pointers(void) {
  const char *odd = (const char *)x + 1;
  size_t bytes;
  dvit_predictor lacking = predictor;
  lacking.w3 = NULL;
  CHECK(prune(NULL) == DVIT_INVALID && strstr(dvit_last_error(), "shape"));
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, odd, kept_x, position, workspace, sizeof(workspace), 1) ==
            DVIT_INVALID &&
        strcmp(dvit_last_error(), "x: is not aligned to 4 bytes") == 0);
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, x, NULL, position, workspace, sizeof(workspace), 1) ==
            DVIT_INVALID &&
        strcmp(dvit_last_error(), "kept_x: is null") == 0);
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, NULL, workspace, sizeof(workspace), 1) ==
            DVIT_INVALID &&
        strstr(dvit_last_error(), "index"));
  CHECK(dvit_prune_tokens(&right, &lacking, 1e-5f, x, kept_x, position, workspace, sizeof(workspace), 1) ==
            DVIT_INVALID &&
        strstr(dvit_last_error(), "predictor.w3"));
  CHECK(dvit_prune_tokens(&right, NULL, 1e-5f, x, kept_x, position, workspace, sizeof(workspace), 1) == DVIT_INVALID &&
        strstr(dvit_last_error(), "predictor"));
  CHECK(dvit_prune_tokens(&right, &predictor, NAN, x, kept_x, position, workspace, sizeof(workspace), 1) ==
            DVIT_INVALID &&
        strstr(dvit_last_error(), "eps"));
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, position, NULL, 0, 1) == DVIT_INVALID);
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, position, workspace, 9, 1) == DVIT_WORKSPACE &&
        strstr(dvit_last_error(), "workspace_bytes: 9"));
  CHECK(dvit_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, position, workspace, sizeof(workspace), -1) ==
            DVIT_INVALID &&
        strstr(dvit_last_error(), "threads"));
  CHECK(dvit_select_gather(&right, x, NULL, kept_x, position, 1) == DVIT_INVALID && strstr(dvit_last_error(), "score"));
  CHECK(dvit_prune_tokens_workspace(&right, 1, NULL) == DVIT_INVALID);
  CHECK(dvit_prune_tokens_workspace(&right, 1, &bytes) == DVIT_OK && bytes <= sizeof(workspace));
}

/* The strides of one picture and of one row are never taken. */
static void single(void) {
  dvit_tokens shape = right;
  shape.batch = 1;
  shape.batch_stride = INT64_MAX;
  CHECK(prune(&shape) == DVIT_OK);
  shape.prefix = 0;
  shape.tokens = shape.keep = 1;
  shape.token_stride = INT64_MIN;
  CHECK(prune(&shape) == DVIT_OK);
}

static void cuda(void) {
  size_t bytes = 0;
  dvit_tokens shape = right;
  if (!dvit_has_cuda()) {
    CHECK(dvit_cuda_prune_tokens_workspace(&right, &bytes) == DVIT_NO_CUDA);
    CHECK(dvit_cuda_select_gather(&right, x, score, kept_x, position, NULL) == DVIT_NO_CUDA);
    CHECK(dvit_cuda_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, position, NULL, 0, NULL) == DVIT_NO_CUDA);
    CHECK(strstr(dvit_last_error(), "without CUDA"));
    return;
  }
  CHECK(dvit_cuda_prune_tokens_workspace(&right, &bytes) == DVIT_OK && bytes > 0);
  shape.channels = 80;
  CHECK(dvit_cuda_prune_tokens_workspace(&shape, &bytes) == DVIT_UNSUPPORTED && strstr(dvit_last_error(), "channels"));
  shape.channels = C;
  shape.tokens = 4097;
  CHECK(dvit_cuda_prune_tokens_workspace(&shape, &bytes) == DVIT_UNSUPPORTED && strstr(dvit_last_error(), "tokens"));
  CHECK(dvit_cuda_prune_tokens(&right, &predictor, 1e-5f, x, kept_x, position, workspace, 9, NULL) == DVIT_WORKSPACE);
}

int main(void) {
  dvit_tokens none = right;
  int i;
  CHECK(strcmp(dvit_last_error(), "") == 0);
  CHECK(strcmp(dvit_version(), DVIT_EXPECTED_VERSION) == 0);
  for (i = -1; i <= DVIT_CUDA_ERROR + 1; ++i) CHECK(strlen(dvit_status_string((dvit_status)i)) > 0);
  sizes();
  pointers();
  single();
  cuda();
  none.batch = 0;
  CHECK(dvit_prune_tokens(&none, NULL, 0, NULL, NULL, NULL, NULL, 0, 0) == DVIT_OK);
  CHECK(dvit_select_gather(&none, NULL, NULL, NULL, NULL, 0) == DVIT_OK);
  CHECK(prune(&right) == DVIT_OK && position[0] == 0 && position[K - 1] == K - 1); /* all scores are 0 */
  printf("api: version %s, %s CUDA\n", dvit_version(), dvit_has_cuda() ? "with" : "without");
  return 0;
}
