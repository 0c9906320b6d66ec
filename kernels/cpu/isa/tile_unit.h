/*
 * The tile unit's instructions (Intel AMX); the compilers' own functions for them don't all say
 * that they read memory. Tiles are numbered 0..7; in memory they have rows of 64 bytes, one after
 * the other. Tests have another of this file, which computes in plain C what they do.
 */
#ifndef TS_TILE_UNIT_H
#define TS_TILE_UNIT_H

#ifdef TS_TILE_UNIT
#include TS_TILE_UNIT
#else

#include <cpuid.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_NAME(tile) TILE_NAME_(tile)
#define TILE_NAME_(tile) "%%tmm" #tile
#define TILE_CONFIGURE(config) __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory")
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero " TILE_NAME(tile)::)
#define TILE_LOAD(tile, from)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), " TILE_NAME(tile)::"r"(from), "r"(64L) : "memory")
#define TILE_STORE(tile, to)                                                                       \
    __asm__ volatile("tilestored " TILE_NAME(tile) ", (%0,%1,1)" ::"r"(to), "r"(64L) : "memory")
/* sums[16][16] of fp32 += a[16][16][2] times b[16][16][2], of bf16, over the second and third. */
#define TILE_MULTIPLY(sums, a, b)                                                                  \
    __asm__ volatile("tdpbf16ps " TILE_NAME(b) ", " TILE_NAME(a) ", " TILE_NAME(sums)::)

/* Whether the processor has it, with bf16, and the kernel lets this process use it, which it has to
 * be asked for (Linux 5.16). */
static inline bool ts_tile_unit_usable(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    enum { REQUEST_STATE = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM; asm/prctl.h */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & AMX_BF16) != 0 &&
           (d & AMX_TILE) != 0 && syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
}

#endif
#endif
