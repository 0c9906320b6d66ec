/* The kernels in 64-bit ARM's 16-byte vectors, with fused multiply-add and fp16 conversion. */
#include <arm_neon.h>
#define VL 4
#define FMA(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LOAD_FP16(p) ((vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define TS_ATTENTION_OPS ts_attention_neon
#include "attention_kernel.inc.h"
