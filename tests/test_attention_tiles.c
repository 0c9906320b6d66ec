/* test_attention, on the emulated tile unit alone. */
#include "attention.h"

#define ONLY_ISA TS_ISA_AMX
#include "test_attention.c"
