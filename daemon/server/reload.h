/*
 * What a configuration that is read again changes while the daemon runs: the log's level, the
 * quotas of sessions and tenants, and whether pools have a prefix cache. What else differs is
 * named, and stays as it was.
 *
 * Thread: main's. The engine must run.
 */
#ifndef TS_RELOAD_H
#define TS_RELOAD_H

#include "config.h"
#include "config_keys.h"
#include "server.h"

/* Whether a change of the key would be taken: true of each that reloads. */
bool ts_reload_takes(const ts_config_section *section, const ts_config_key *key);

/* Changes what can be changed to what `next` says, in `running` too; logs what can't. */
void ts_reload(ts_service *service, ts_config *running, const ts_config *next);

/* What was taken over from an earlier daemon (takeover.h) becomes as the configuration says. */
void ts_reload_taken_over(ts_service *service, ts_config *running);

#endif
