/*
 * A command as bytes, for the journal: what it is made of, what it points to, and a digest of what
 * came of it. A later version may have more fields at the end of a command's struct: what an
 * earlier one left out is 0.
 *
 * Thread: any.
 */
#ifndef TS_COMMAND_CODEC_H
#define TS_COMMAND_CODEC_H

#include "engine.h"

#define TS_COMMAND_ARRAYS 3u /* that one command points to, at most */

/* Bytes that the command takes; a multiple of 8. */
size_t ts_command_bytes(const ts_command *command);

/* Writes it to `out`, which has room for them. */
void ts_command_write(const ts_command *command, void *out);

/* The parts of a command that is read that don't lie in its bytes. */
typedef struct ts_command_room {
    ts_pool_config config;
    ts_engine_limits limits;
} ts_command_room;

/* The command in `bytes` bytes at `in`, to which it points, and to *room. False: there is none, or
 * one whose fields speak of more or less than it points to. */
bool ts_command_read(const void *in, size_t bytes, ts_command_room *room, ts_command *command);

/* The same outcome has the same digest, and another most likely another: the status, and the ids,
 * blocks and lengths that were told. */
uint32_t ts_command_digest(const ts_command *command, const ts_answer *answer);

/* Whether there is such a command, as far as its bytes go; whether its answer has the ids of
 * sequences, and nothing else (ts_answer.seqs). */
bool ts_command_is_known(uint32_t op);
bool ts_command_answers_ids(uint32_t op);

/* Whether the command only looks: it changes nothing but the engine's time. */
bool ts_command_only_looks(const ts_command *command);

#endif
