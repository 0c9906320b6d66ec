/* The kernels in 16-byte vectors that every compiler target has. */
#define VL 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define TS_ATTENTION_OPS ts_attention_portable
#include "attention_kernel.inc.h"
