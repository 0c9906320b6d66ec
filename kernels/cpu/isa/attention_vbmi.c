/* The kernels in 64-byte vectors where there are byte permutations: fp8 by look-ups, and on the
 * tile unit, as bf16 is there. The others are ts_attention_avx512's. */
#include "attention_avx512.inc.h"
#include "fp8_bytes.h"
#define LOOK_UP_FP8
#define TS_ATTENTION_OPS ts_attention_vbmi
#define TS_ATTENTION_OTHERS ts_attention_avx512
#define TS_ATTENTION_TILES ts_attention_amx
#include "attention_kernel.inc.h"
