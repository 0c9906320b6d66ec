/* The kernels in 64-byte vectors. */
#include "attention_avx512.inc.h"
#define TS_ATTENTION_OPS ts_attention_avx512
#include "attention_kernel.inc.h"
