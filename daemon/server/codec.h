/*
 * Between protobuf messages and the engine's commands and answers. What a message claims of itself
 * (counts that must agree, values that must fit) is checked here; what it means, in the engine.
 *
 * Thread: the engine's. Decoded commands point into the message, encoded replies into the answer.
 */
#ifndef TS_CODEC_H
#define TS_CODEC_H

#include "engine.h"
#include "tinyserve.pb-c.h"

/* What the bodies of a reply are built in. */
typedef union ts_reply_body {
    Tspb__ExchangeOpened exchange_opened;
    Tspb__PoolOpened pool_opened;
    Tspb__Seqs seqs;
    Tspb__Lengths lengths;
    Tspb__Room room;
    Tspb__Matched matched;
    Tspb__Ticket ticket;
    Tspb__KeptList kept_list;
    Tspb__Blocks blocks;
    Tspb__StepBegun step_begun;
} ts_reply_body;

/* Whether `request` becomes a command of the engine. False with `answer` refusing, or with TS_OK
 * for a request that is answered otherwise (a report, or opening a session). */
bool ts_decode(const Tspb__Request *request, uint64_t session, ts_command *command,
               ts_answer *answer);

/* The kernel of this name; empty: the pool's. False, and the answer refuses: there is none. */
bool ts_decode_kernel(const char *name, ts_kernel *kernel, ts_answer *answer);

/* Whether all of the request's strings are plain text (plain_text.h), but for the program's name,
 * which is made plain; else the answer refuses. */
bool ts_decode_plain(const Tspb__Request *request, ts_answer *answer);

/* Fills in the reply's status, sentence and numbers, which point into the answer. */
void ts_encode_status(const ts_answer *answer, Tspb__Reply *reply);

/* Fills in the reply to a request whose command was applied; slabs of an answer are the caller's to
 * add. */
void ts_encode(const ts_engine *engine, const Tspb__Request *request, const ts_command *command,
               const ts_answer *answer, Tspb__Reply *reply, ts_reply_body *body);

#endif
