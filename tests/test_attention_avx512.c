/* test_attention, on AVX-512 without byte permutations alone. */
#include "attention.h"

#define ONLY_ISA TS_ISA_AVX512
#include "test_attention.c"
