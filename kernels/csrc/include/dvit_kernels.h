/* dvit_kernels: token pruning of DynamicViT (Rao et al. 2021, sections 3.2 and 3.3) on CPUs and NVIDIA GPUs.
 *
 * A picture is P prefix tokens (class, distillation) and then N patch tokens, of C channels each. Pruning keeps the
 * prefix and the k patch tokens of the highest scores, in their order: (B, P+N, C) -> (B, P+k, C). Rows that stay are
 * copied bit by bit. Of equal scores the lower position wins, -0.0 equals 0.0, NaN ranks last.
 *
 * Every function may be called by any number of threads at once. One that fails has written nothing (unless it says
 * DVIT_CUDA_ERROR) and leaves a message of one line in dvit_last_error().
 */
#ifndef DVIT_KERNELS_H
#define DVIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DVIT_API
#else
#define DVIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum dvit_status {
  DVIT_OK = 0,
  DVIT_INVALID = 1,     /* an argument is null, misaligned or out of range; the message names it */
  DVIT_UNSUPPORTED = 2, /* right in itself, but a size that this function does not take */
  DVIT_WORKSPACE = 3,   /* the workspace is too small */
  DVIT_NO_CUDA = 4,     /* this library was built without CUDA */
  DVIT_CUDA_ERROR = 5   /* what CUDA said is in the message; it may be about earlier work, which CUDA reports late */
} dvit_status;

typedef enum dvit_dtype { DVIT_FLOAT32 = 0, DVIT_FLOAT16 = 1, DVIT_BFLOAT16 = 2 } dvit_dtype;

/* The tokens x of a batch, and how many stay. Element (b, t, c) of x is x[b * batch_stride + t * token_stride + c];
 * strides are in elements and of any sign. Outputs are dense. A batch of 0 is fine: nothing is done. */
typedef struct dvit_tokens {
  int32_t dtype;    /* a dvit_dtype, of x and kept_x */
  int64_t batch;    /* B */
  int64_t prefix;   /* P, 0 or more */
  int64_t tokens;   /* N, 1 or more */
  int64_t channels; /* C */
  int64_t keep;     /* k, 1 to N */
  int64_t batch_stride;
  int64_t token_stride;
} dvit_tokens;

/* A score predictor, row-major and dense, as dvit_infer.pack_predictor makes it: LayerNorm's gain and shift are folded
 * into w1 and b1. Matrices are in the dtype of the tokens. */
typedef struct dvit_predictor {
  const void *w1;      /* (C, C) */
  const float *w1_sum; /* (C) row sums of w1 */
  const float *b1;     /* (C) */
  const void *w2_own;  /* (C/2, C/2) for a token's own half of the first layer */
  const void *w2_mean; /* (C/2, C/2) for the other half's mean over the picture */
  const float *b2;     /* (C/2) */
  const void *w3;      /* (C/4, C/2) */
  const float *b3;     /* (C/4) */
  const float *w4;     /* (C/4) keep minus drop */
  const float *b4;     /* (1) */
} dvit_predictor;

/* The package's version, such as "0.1.0". */
DVIT_API const char *dvit_version(void);

/* 1 if the library was built with CUDA, else 0. */
DVIT_API int dvit_has_cuda(void);

/* A dvit_status in a few words; never null, whatever the number. */
DVIT_API const char *dvit_status_string(int status);

/* Why this thread's last call of this library failed; "" before the first failure. Valid until the next one. */
DVIT_API const char *dvit_last_error(void);

/* Outputs and the workspace must overlap neither each other nor anything that is read.
 *
 * threads: how many work on it at most; 0: as many as OpenMP is set to in this thread where the process has OpenMP,
 * else as many as there are processors that this thread may run on. */

/* Choose by given scores and gather: x and score (B, N) -> kept_x (B, P+k, C) and index (B, k), ascending positions
 * among the N. C is at most 2^20. Of N there is no limit but that of all functions: x has at most 2^48 elements, and
 * its strides reach no further. */
DVIT_API dvit_status dvit_select_gather(const dvit_tokens *shape, const void *x, const float *score, void *kept_x,
                                        int64_t *index, int threads);

/* How many bytes of workspace dvit_prune_tokens needs for these sizes and threads. */
DVIT_API dvit_status dvit_prune_tokens_workspace(const dvit_tokens *shape, int threads, size_t *bytes);

/* Score, choose and gather. C: even, 4 or more. eps: of LayerNorm. workspace: of any alignment; nothing in it matters
 * before or after. threads: as given to dvit_prune_tokens_workspace; if that was 0 and what it stands for has grown
 * since, DVIT_WORKSPACE may be returned. Scores are computed in float32 but for the hidden layers, which are rounded to
 * the dtype; they do not depend on the batch or on threads. Between processors with AVX-512, with AVX2 and others they
 * may differ in the last digits, and so may the choice between tokens as near to each other. */
DVIT_API dvit_status dvit_prune_tokens(const dvit_tokens *shape, const dvit_predictor *predictor, float eps,
                                       const void *x, void *kept_x, int64_t *index, void *workspace,
                                       size_t workspace_bytes, int threads);

/* The same on an NVIDIA GPU of compute capability 8.0 or later. Tensors, weights and the workspace are in memory of the
 * current device; stream is a cudaStream_t of it (null: its legacy default stream). Work is put into the stream and the
 * call returns: it allocates nothing, waits for nothing and can be captured into a CUDA graph. Only the first call for
 * a device, dtype and alignment may allocate and wait, as CUDA loads the kernels then: make it before capturing.
 * Results do not depend on timing. N is at most 4096; dvit_cuda_prune_tokens takes C from 64 to 1024 in multiples of
 * 32. */
DVIT_API dvit_status dvit_cuda_select_gather(const dvit_tokens *shape, const void *x, const float *score, void *kept_x,
                                             int64_t *index, void *stream);
DVIT_API dvit_status dvit_cuda_prune_tokens_workspace(const dvit_tokens *shape, size_t *bytes);
DVIT_API dvit_status dvit_cuda_prune_tokens(const dvit_tokens *shape, const dvit_predictor *predictor, float eps,
                                            const void *x, void *kept_x, int64_t *index, void *workspace,
                                            size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif
