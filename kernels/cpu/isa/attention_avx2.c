/* The kernels in 32-byte vectors with fused multiply-add and hardware fp16 conversion. */
#include <immintrin.h>
#define VL 8
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define LOAD_FP16(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define LOAD_UINT16(p) ((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define TS_ATTENTION_OPS ts_attention_avx2
#include "attention_kernel.inc.h"
