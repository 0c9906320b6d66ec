/*
 * Which slabs of GPU pools a session was given descriptors of, and so may map; and their return
 * when they become another tenant's (proto/revocations.h). What isn't returned yet is counted as
 * memory that the session's tenant holds of the GPU.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns them.
 */
#ifndef TS_SLAB_HOLDER_H
#define TS_SLAB_HOLDER_H

#include "revocations.h"
#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct ts_slab_holder ts_slab_holder;

/* A holder with its page and its bell. TS_ENOMEM with a sentence in `why`. */
ts_status ts_slab_holder_new(ts_slab_holder **out, char *why, size_t why_bytes);

/* The descriptors stay the holder's. */
int ts_slab_holder_page(const ts_slab_holder *holder);
int ts_slab_holder_bell(const ts_slab_holder *holder);

/* The session is given a descriptor of this slab. *held counts the slab's bytes while it is being
 * returned, and must live as long as the holder. TS_ENOMEM with a sentence. */
ts_status ts_slab_holder_note(ts_slab_holder *holder, uint32_t pool, uint32_t slab,
                              uint32_t generation, uint64_t bytes, uint64_t *held, char *why,
                              size_t why_bytes);

/* The slab goes: the session is told to return its descriptor. NULL is fine. */
void ts_slab_holder_revoke(ts_slab_holder *holder, uint32_t pool, uint32_t slab, uint64_t now_ms);

/* Looks what was returned, and tells the session of slabs for which there was no room before. True:
 * it owes slabs, and has returned none for `most_ms`. NULL is fine. */
bool ts_slab_holder_look(ts_slab_holder *holder, uint64_t now_ms, uint32_t most_ms);

/* Slabs that the session has yet to return, those that it wasn't told of yet included. NULL: 0. */
uint32_t ts_slab_holder_owes(const ts_slab_holder *holder);

/* NULL is fine. */
void ts_slab_holder_free(ts_slab_holder *holder);

#endif
