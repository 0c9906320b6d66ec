/*
 * The words of a GPU in which sessions' completed runs are counted (session_memory.h): memory that
 * the device writes and no client sees. A word is its page's until the last run that uses the page
 * is over; all of them are there for as long as the GPU's executor is, which looks at words of runs
 * that are over.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns them, but for the words
 * themselves, which are read and written by anybody.
 */
#ifndef TS_DONE_WORDS_H
#define TS_DONE_WORDS_H

#include "gpu.h"

typedef struct ts_done_words ts_done_words;

/* TS_ENOMEM, or what ts_gpu_pin returns, with a sentence. */
ts_status ts_done_words_new(ts_gpu *gpu, uint32_t count, ts_done_words **out, char *why,
                            size_t why_bytes);

/* The words stay until all that were taken are given back. NULL is fine. */
void ts_done_words_release(ts_done_words *words);

/* Takes one: its address here and on the device. False: all are taken. */
bool ts_done_words_take(ts_done_words *words, uint32_t **word, uint32_t **there);
void ts_done_words_give(ts_done_words *words, const uint32_t *word);

#endif
