/* tsctl and tinyserved as programs: what they print, in which width, and with which exit status. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "command_util.h"
#include "plain_text.h"

#include <fcntl.h>
#include <jansson.h>

/* Characters of the longest line; UTF-8 continuation bytes don't count. */
static size_t widest(const char *text)
{
    size_t width = 0, most = 0;
    for (; *text != '\0'; text++) {
        if (*text == '\n')
            width = 0;
        else if (((unsigned char)*text & 0xc0) != 0x80)
            width++;
        if (width > most)
            most = width;
    }
    return most;
}

/* 3 sequences: 20 tokens, a fork of them with 3 more, and 1 token; blocks of 16. */
static void populate(ts_client *c)
{
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seq, child, lone;
    uint32_t n = 20;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &n, 1, NULL));
    OK(ts_seq_fork(p, seq, 1, &child));
    n = 3;
    OK(ts_seq_append(p, &child, &n, 1, NULL));
    OK(ts_seq_create(p, 1, &lone));
    n = 1;
    OK(ts_seq_append(p, &lone, &n, 1, NULL));
    OK(ts_seq_keep(p, seq, "system-prompt"));
    ts_pool_close(p);
}

static json_int_t number(json_t *object, const char *key)
{
    json_t *value = json_object_get(object, key);
    if (!json_is_integer(value))
        fail_msg("no integer '%s'", key);
    return json_integer_value(value);
}

static void every_command_shows_the_exact_figures_within_80_columns(void **state)
{
    (void)state;
    daemon_process d;
    char text[65536], url[128];
    daemon_start(&d, POOL_TINY ",blocks=64,client_write=all");
    ts_client *c = connect_to(&d);
    populate(c);
    snprintf(url, sizeof url, "--socket=%s", d.url);
    static const char *const commands[] = {"status", "pools", "sessions", "seqs",
                                           "frag",   "map",   "cache",    "check"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        assert_int_equal(run(text, sizeof text, TS_CTL " %s %s", commands[i], url), 0);
        if (widest(text) > 80)
            fail_msg("%s is %zu columns wide:\n%s", commands[i], widest(text), text);
        assert_null(strchr(text, '\033')); /* no colours into a pipe */
        assert_int_equal(run(text, sizeof text, TS_CTL " %s %s --json", commands[i], url), 0);
        json_error_t error;
        json_t *value = json_loads(text, 0, &error);
        if (value == NULL)
            fail_msg("%s: %s", commands[i], error.text);
        json_decref(value);
    }
    /* 20 tokens: blocks 0 and 1; the fork shares block 0 and has its own tail; the last has one. */
    run(text, sizeof text, TS_CTL " frag %s", url);
    assert_has(text, "blocks      64 total   4 used (6 %)   1 shared   0 cached   60 free");
    assert_has(text,
               "tokens      28 stored in 64 slots: 43.8 % efficient, 216.0 KiB of tails unused");
    assert_has(text, "sharing     384.0 KiB stored, 480.0 KiB seen by 3 sequences: 1.2 x");
    assert_has(text,
               "otherwise   414.0 KiB if each sequence had a buffer of the longest length (23)");
    assert_has(text, "unused runs 32 █");
    run(text, sizeof text, TS_CTL " frag %s --json", url);
    json_t *frag = json_loads(text, 0, NULL);
    assert_int_equal(number(frag, "stored_tokens"), 28);
    assert_int_equal(number(frag, "seen_tokens"), 44);
    assert_int_equal(number(frag, "tail_waste_bytes"), 36 * 6144);
    assert_int_equal(number(frag, "contiguous_bytes"), 3 * 23 * 6144);
    assert_int_equal(number(json_object_get(frag, "pool"), "shared_blocks"), 1);
    json_decref(frag);
    run(text, sizeof text, TS_CTL " map %s", url);
    assert_has(text, "           0 S░▒░····"); /* shared and full; 4, 7 and 1 of 16 */
    run(text, sizeof text, TS_CTL " map %s --color=always", url);
    assert_has(text, "\033[35m█\033[0m░▒░·");
    run(text, sizeof text, TS_CTL " seqs %s", url);
    assert_has(text, "20      2       1");
    assert_has(text, "system-prompt");
    /* In place of a session: when its time ends. */
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seqs[2];
    uint8_t ticket[TS_TICKET_BYTES];
    const ts_keep_options ends = {.size = sizeof ends, .ttl_ms = 3600000ull * 100};
    OK(ts_seq_create(p, 2, seqs));
    OK(ts_seq_keep_with(p, seqs[0], "short", &ends));
    OK(ts_seq_ticket(p, seqs[1], 600000, ticket));
    run(text, sizeof text, TS_CTL " seqs %s", url);
    assert_has(text, "ends in 4 days   short");
    assert_has(text, "ticket: 9 min    -");
    assert_true(widest(text) <= 80);
    run(text, sizeof text, TS_CTL " seqs %s --json", url);
    json_t *all = json_loads(text, 0, NULL), *kept = json_array_get(all, 3);
    assert_in_range(number(kept, "left_ms"), 1, ends.ttl_ms);
    assert_false(json_boolean_value(json_object_get(kept, "on_ticket")));
    assert_true(json_boolean_value(json_object_get(json_array_get(all, 4), "on_ticket")));
    assert_true(json_is_null(json_object_get(json_array_get(all, 0), "left_ms")));
    json_decref(all);
    ts_pool_close(p);
    run(text, sizeof text, TS_CTL " check %s", url);
    assert_has(text, "0 problems");
    assert_int_equal(run(text, sizeof text,
                         "timeout 20 " TS_CTL " pools %s --watch=0.1 --json | head -n 2", url),
                     0);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* The line of the text that begins with this. */
static const char *line_of(const char *text, const char *beginning)
{
    static char line[512];
    const char *at = text;
    while (at != NULL && strncmp(at, beginning, strlen(beginning)) != 0)
        at = (at = strchr(at, '\n')) == NULL ? NULL : at + 1;
    if (at == NULL)
        fail_msg("no line begins with '%s' in:\n%s", beginning, text);
    snprintf(line, sizeof line, "%.*s", (int)strcspn(at, "\n"), at);
    return line;
}

static void a_long_list_comes_in_short_answers(void **state)
{
    (void)state;
    enum { N = 500, MOST = 200 };
    daemon_process d;
    static char text[1 << 20];
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seqs[N];
    OK(ts_seq_create(p, N, seqs));
    Tspb__ListSeqs list = TSPB__LIST_SEQS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_LIST_SEQS;
    request.list_seqs = &list;
    for (size_t left = N; left > 0;) { /* an answer holds up everybody else: it is short */
        Tspb__Reply *reply;
        OK(ts_call(c, &request, &reply));
        assert_int_equal(reply->seq_list->n_seqs, left < MOST ? left : MOST);
        left -= reply->seq_list->n_seqs;
        assert_int_equal(reply->seq_list->next, left > 0 ? N - left : 0);
        list.after = reply->seq_list->next;
        tspb__reply__free_unpacked(reply, NULL);
    }
    assert_int_equal(run(text, sizeof text, TS_CTL " seqs --json --socket=%s", d.url), 0);
    json_t *all = json_loads(text, 0, NULL);
    assert_int_equal(json_array_size(all), N);
    json_decref(all);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void names_that_could_write_to_a_terminal_are_refused_or_escaped(void **state)
{
    (void)state;
    static const char *const bad[] = {"evil\n100000000  1001 FAKE ROW",
                                      "\033]0;owned\a",
                                      "\x7f",
                                      "tab\there",
                                      "\xc2\x9b\x33\x31m",
                                      "\xff\xfe\"}bad",
                                      "\xc0\x80",
                                      "cut \xe4\xb8",
                                      "\xed\xa0\x80",
                                      "\xe2\x80\xae</script>",
                                      "\xe2\x80\xa8",
                                      "\xf4\x90\x80\x80"};
    daemon_process d;
    char text[65536], id[32];
    daemon_start(&d, POOL_TINY ",blocks=64");
    ts_client *c;
    /* 60 bytes, and characters of three: none is cut in half. */
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                .url = d.url,
                                .program = "x\n\033[31m\xe7\x8e\x8b\xe7\x8e\x8b"},
                  &c));
    ts_pool *p = open_pool(c, "tiny", 0), *none;
    ts_seq seq, found;
    OK(ts_seq_create(p, 1, &seq));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char expected[160] = "name '", *end = expected + strlen(expected);
        assert_int_equal(ts_seq_keep(p, seq, bad[i]), TS_EINVAL);
        ts_text_escape(bad[i], end, 100);
        strcat(expected, "' has control characters, or isn't UTF-8");
        assert_has(ts_error(c), expected);
        assert_int_equal(ts_seq_attach(p, bad[i], &found, NULL), TS_EINVAL);
        assert_int_equal(ts_pool_open(c, bad[i], 0, &none), TS_EINVAL);
    }
    OK(ts_seq_keep(p, seq, "\xe7\x8e\x8b \xc3\xa9\xf0\x9f\x98\x80"));
    run(text, sizeof text, TS_CTL " sessions --socket=%s", d.url);
    snprintf(id, sizeof id, "%llx", (unsigned long long)ts_session_id(c));
    /* Columns of a terminal: two for each of those characters. */
    assert_has(line_of(text, id), "x\\x0a\\x1b[31m\xe7\x8e\x8b\xe7\x8e\x8b       0");
    run(text, sizeof text, TS_CTL " seqs --json --socket=%s", d.url);
    json_t *seqs = json_loads(text, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(json_array_get(seqs, 0), "name")),
                        "\xe7\x8e\x8b \xc3\xa9\xf0\x9f\x98\x80");
    json_decref(seqs);
    assert_int_equal(run(text, sizeof text,
                         TS_CTL " --socket=%s pool create \"$(printf 'a\033b')\" layers=1", d.url),
                     1);
    assert_has(text, "text 'a\\x1bb:layers=1' has control characters");
    assert_int_equal(
        run(text, sizeof text, TS_DAEMON " --check-config --pool \"$(printf 'a\033b'):layers=1\""),
        2);
    assert_has(text,
               "a pool's name is plain text, without control characters, in UTF-8: 'a\\x1bb'");
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* How many sessions the daemon has, tsctl's own left out. */
static json_int_t sessions_of(const char *url)
{
    char text[4096];
    assert_int_equal(run(text, sizeof text, TS_CTL " status %s --json", url), 0);
    json_t *status = json_loads(text, 0, NULL);
    json_int_t n = number(status, "sessions") - 1;
    json_decref(status);
    return n;
}

static void operators_end_sessions_free_sequences_and_drain(void **state)
{
    (void)state;
    daemon_process d;
    char text[4096], url[128], says[128];
    static const char *const more[] = {"--set", "socket_mode=0666", NULL};
    daemon_start_with(&d, POOL_TINY ",blocks=64,client_write=all", more);
    snprintf(url, sizeof url, "--socket=%s", d.url);
    ts_client *c = connect_to(&d), *refused;
    populate(c);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq kept, mine;
    uint32_t tokens, n = 3;
    OK(ts_seq_attach(p, "system-prompt", &kept, &tokens));
    OK(ts_seq_create(p, 1, &mine));
    OK(ts_seq_append(p, &mine, &n, 1, NULL));

    /* Nothing is done without being sure; what isn't there is named. */
    assert_int_equal(run(text, sizeof text, TS_CTL " %s seq free %llx </dev/null", url,
                         (unsigned long long)kept),
                     2);
    assert_has(text, "? Add --yes, or run it on a terminal.");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s --yes seq free xyz", url), 2);
    assert_has(text, "'xyz' is no id; they are hexadecimal");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s --yes seq free 12345", url), 1);
    assert_has(text, "pool 'tiny' has no sequence 12345");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s --yes -P other seq free 12345", url), 1);
    assert_has(text, "there is no pool 'other'");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s --yes session kick 12345", url), 1);
    assert_has(text, "there is no session 12345");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s session", url), 2);
    assert_has(text, "there is no command 'session'; there is session kick ID\n");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s pool create", url), 2);
    assert_has(text, "it is used as: tsctl pool create NAME KEY=VALUE ...\n");
    assert_int_equal(run(text, sizeof text, TS_CTL " %s pool show tiny", url), 2);
    assert_has(text, "there is no command 'pool show tiny'; there are pool create NAME KEY=VALUE "
                     "..., pool delete NAME, pool resize NAME SIZE\n");

    /* A kept sequence, and one of a session that uses it no more. */
    ts_step *step;
    OK(ts_step_begin(p, &mine, &n, 1, NULL, &step));
    assert_int_equal(
        run(text, sizeof text, TS_CTL " %s --yes seq free %llx", url, (unsigned long long)mine), 1);
    assert_has(text, "is in an open step");
    OK(ts_step_abort(step));
    assert_int_equal(
        run(text, sizeof text, TS_CTL " %s -y seq free %llx", url, (unsigned long long)kept), 0);
    assert_int_equal(
        run(text, sizeof text, TS_CTL " %s -j -y seq free %llx", url, (unsigned long long)mine), 0);
    snprintf(says, sizeof says, "{\n  \"freed_seq\": \"%llx\"\n}\n", (unsigned long long)mine);
    assert_string_equal(text, says); /* one object for each order */
    assert_int_equal(ts_seq_attach(p, "system-prompt", &kept, &tokens), TS_ENOENT);
    assert_int_equal(ts_seq_lengths(p, &mine, 1, &tokens), TS_ENOENT);
    run(text, sizeof text, TS_CTL " check %s", url);
    assert_has(text, "0 problems");

    /* Draining: who is there goes on, nobody comes but operators. */
    assert_int_equal(run(text, sizeof text, TS_CTL " %s drain maybe", url), 2);
    assert_int_equal(run(text, sizeof text, TS_CTL " %s drain </dev/null", url), 2);
    assert_int_equal(run(text, sizeof text, TS_CTL " %s drain --yes --json", url), 0);
    assert_string_equal(text, "{\n  \"draining\": true\n}\n");
    run(text, sizeof text, TS_CTL " status %s", url);
    assert_has(text, "draining: no new sessions are taken, but operators'");
    OK(ts_seq_create(p, 1, &mine));
    if (getuid() == 0) { /* somebody who is no operator */
        assert_int_equal(
            run(text, sizeof text, "%s status %s", ctl_of_others(&d, "--reuid 65534"), url), 1);
        assert_has(text, "the daemon is being drained: it takes no new sessions");
    }
    assert_int_equal(run(text, sizeof text, TS_CTL " %s drain off -j", url), 0);
    assert_string_equal(text, "{\n  \"draining\": false\n}\n");
    if (getuid() == 0) {
        assert_int_equal(run(text, sizeof text, "%s %s --yes session kick %llx",
                             ctl_of_others(&d, "--reuid 65534"), url,
                             (unsigned long long)ts_session_id(c)),
                         1);
        assert_has(text, "uid 65534 is no operator: root and uid 0 are");
        ctl_of_others_remove(&d);
    }
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &refused));
    ts_disconnect(refused);

    /* A session is ended: its client is told at once, by ring and by message, and its blocks are
     * free. */
    assert_int_equal(sessions_of(url), 1);
    assert_int_equal(run(text, sizeof text, TS_CTL " %s --yes -j session kick %llx", url,
                         (unsigned long long)ts_session_id(c)),
                     0);
    snprintf(says, sizeof says, "{\n  \"ended_session\": \"%llx\"\n}\n",
             (unsigned long long)ts_session_id(c));
    assert_string_equal(text, says);
    assert_int_equal(sessions_of(url), 0);
    assert_int_equal(ts_step_begin(p, &mine, &n, 1, NULL, &step), TS_ECONN);
    assert_has(ts_error(c), "was ended by an operator");
    assert_int_equal(ts_seq_create(p, 1, &mine), TS_ECONN);
    assert_has(ts_error(c), "was ended by an operator");
    run(text, sizeof text, TS_CTL " frag %s", url);
    assert_has(text, "blocks      64 total   0 used");
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* A control that answers as MPS' does and writes down what it is asked. */
static void fake_mps_start(const char *folder, const char *script)
{
    char path[300];
    snprintf(path, sizeof path, "%s/control", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fclose(f);
    snprintf(path, sizeof path, "%s/nvidia-cuda-mps-control", folder);
    f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f, "#!/bin/sh\nread -r words\necho \"$words\" >>%s/asked\n%s\n", folder, script);
    fclose(f);
    assert_int_equal(chmod(path, 0755), 0);
}

static void a_kick_first_ends_the_processes_work_on_the_gpu_where_mps_runs(void **state)
{
    (void)state;
    daemon_process d;
    char text[4096], url[256], with_mps[800], folder[] = "/tmp/tinyserve-mps.XXXXXX", asked[300],
                                              script[400];
    ts_client *c;
    assert_non_null(mkdtemp(folder));
    snprintf(with_mps, sizeof with_mps, "PATH=%s:$PATH CUDA_MPS_PIPE_DIRECTORY=%s " TS_CTL, folder,
             folder);
    snprintf(asked, sizeof asked, "%s/asked", folder);
    daemon_start(&d, POOL_TINY ",blocks=4");
    snprintf(url, sizeof url, "--socket=%s", d.url);

    /* Two servers; this process is a client of the second. */
    snprintf(script, sizeof script,
             "case $words in get_server_list) printf '70\\n71\\n';; 'get_client_list 70') "
             "echo 1%d;; 'get_client_list 71') printf '5\\n%d\\n';; esac",
             getpid(), getpid());
    fake_mps_start(folder, script);
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &c));
    assert_int_equal(run(text, sizeof text, "%s %s --yes session kick %llx", with_mps, url,
                         (unsigned long long)ts_session_id(c)),
                     0);
    snprintf(script, sizeof script, "tsctl: MPS has ended the GPU work of process %d\n", getpid());
    assert_string_equal(text, script);
    assert_int_equal(sessions_of(url), 0);
    ts_disconnect(c);
    snprintf(script, sizeof script,
             "get_server_list\nget_client_list 70\nget_client_list 71\nterminate_client 71 %d\n",
             getpid());
    assert_int_equal(run(text, sizeof text, "cat %s", asked), 0);
    assert_string_equal(text, script);

    /* A control that refuses is told of; the session ends all the same. */
    fake_mps_start(folder, "echo 'no server is ready'; exit 1");
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &c));
    assert_int_equal(run(text, sizeof text, "%s %s --yes session kick %llx", with_mps, url,
                         (unsigned long long)ts_session_id(c)),
                     0);
    assert_has(text, "nvidia-cuda-mps-control refused 'get_server_list': no server is ready");
    assert_int_equal(sessions_of(url), 0);
    ts_disconnect(c);
    daemon_stop(&d);
    assert_int_equal(run(text, sizeof text, "rm -r %s", folder), 0);
}

static void errors_say_what_to_do_and_have_their_own_exit_status(void **state)
{
    (void)state;
    char text[4096];
    assert_int_equal(run(text, sizeof text, TS_CTL " status --socket=/nowhere/s"), 3);
    assert_string_equal(text, "tsctl: cannot reach /nowhere/s: is tinyserved running? "
                              "(its log says where it listens)\n");
    assert_int_equal(run(text, sizeof text, TS_CTL " explode"), 2);
    assert_has(text, "there is no command 'explode'; there are status,");
    assert_int_equal(run(text, sizeof text, TS_CTL " map --cells=0"), 2);
    assert_has(text, "--cells 0: 1 to 8192 are possible");
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=4");
    assert_int_equal(run(text, sizeof text, TS_CTL " frag --pool=x --socket=%s", d.url), 1);
    assert_string_equal(text, "tsctl: there is no pool 'x'; there is 'tiny'\n");
    static const char *const commands[] = {"pools", "seqs", "frag", "map"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        assert_int_equal(run(text, sizeof text, TS_CTL " %s tiny -s %s", commands[i], d.url), 0);
        assert_int_equal(run(text, sizeof text, TS_CTL " %s x -s %s", commands[i], d.url), 1);
        assert_string_equal(text, "tsctl: there is no pool 'x'; there is 'tiny'\n");
        assert_int_equal(run(text, sizeof text, TS_CTL " %s tiny -P x -s %s", commands[i], d.url),
                         2);
        assert_string_equal(text, "tsctl: which pool: 'x' or 'tiny'?\n");
    }
    assert_int_equal(run(text, sizeof text, TS_CTL " -s %s --yes seq free 12345 x", d.url), 1);
    assert_has(text, "there is no pool 'x'");
    daemon_stop(&d);
}

static void options_that_a_command_makes_no_use_of_are_refused(void **state)
{
    (void)state;
    char text[4096];
    /* Nothing is asked: there is no daemon. */
    static const char *const changing[] = {"session kick 1",
                                           "seq free 1",
                                           "pool create p layers=1",
                                           "pool delete p",
                                           "drain",
                                           "pool resize p 1M",
                                           "restart",
                                           "cache drop",
                                           "doctor",
                                           "plan"};
    for (size_t i = 0; i < sizeof changing / sizeof *changing; i++) {
        assert_int_equal(run(text, sizeof text, TS_CTL " -y -w -s /nowhere/s %s", changing[i]), 2);
        assert_string_equal(text, "tsctl: --watch is for status, pools, sessions, seqs, frag, map, "
                                  "cache, check and top\n");
    }
    assert_int_equal(run(text, sizeof text, TS_CTL " -c 8 -s /nowhere/s frag"), 2);
    assert_string_equal(text, "tsctl: --cells is for map\n");
    static const char *const of_no_pool[] = {"status", "sessions",       "check",
                                             "drain",  "restart",        "doctor",
                                             "plan",   "session kick 1", "pool delete p"};
    for (size_t i = 0; i < sizeof of_no_pool / sizeof *of_no_pool; i++) {
        assert_int_equal(run(text, sizeof text, TS_CTL " -y -P p -s /nowhere/s %s", of_no_pool[i]),
                         2);
        assert_string_equal(text, "tsctl: --pool is for pools, seqs, frag, map, cache, cache drop, "
                                  "top and seq free\n");
    }
    assert_int_equal(run(text, sizeof text, TS_CTL " -s tcp://x status"), 2);
    assert_has(text, "tsctl: the address tcp://x: the daemon is reached by ipc:///PATH alone");
}

static void what_nobody_could_read_is_an_error(void **state)
{
    (void)state;
    char text[4096];
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=4");
    static const char *const commands[] = {"status", "status --json", "sessions", "doctor",
                                           "map",    "--help",        "--version"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        assert_int_equal(
            run(text, sizeof text, "{ " TS_CTL " -s %s %s >/dev/full; }", d.url, commands[i]), 1);
        assert_has(text, "tsctl: standard output can't be written: No space left on device");
    }
    assert_int_equal(run(text, sizeof text, "{ " TS_CTL " -s %s -w status >/dev/full; }", d.url),
                     1);
    assert_string_equal(text, "tsctl: standard output can't be written: part of it is lost\n");
    /* Begun without a descriptor, whose number no socket may get: what is printed would go there.
     */
    assert_int_equal(run(text, sizeof text, "{ " TS_CTL " -s %s status >&-; }", d.url), 1);
    assert_string_equal(text, "tsctl: standard output can't be written: Bad file descriptor\n");
    assert_int_equal(run(text, sizeof text, "{ " TS_CTL " -s %s --yes drain <&- >&-; }", d.url), 0);
    assert_int_equal(run(text, sizeof text, TS_CTL " -s %s 2>&- status | grep -c '^POOL'", d.url),
                     0);
    assert_string_equal(text, "1\n");
    assert_int_equal(run(text, sizeof text,
                         "{ " TS_DAEMON " --check-config --pool " POOL_TINY
                         ",blocks=4 >/dev/full; }"),
                     1);
    assert_has(text, "tinyserved: standard output can't be written: No space left on device");
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_command_shows_the_exact_figures_within_80_columns),
        cmocka_unit_test(a_long_list_comes_in_short_answers),
        cmocka_unit_test(names_that_could_write_to_a_terminal_are_refused_or_escaped),
        cmocka_unit_test(operators_end_sessions_free_sequences_and_drain),
        cmocka_unit_test(a_kick_first_ends_the_processes_work_on_the_gpu_where_mps_runs),
        cmocka_unit_test(errors_say_what_to_do_and_have_their_own_exit_status),
        cmocka_unit_test(options_that_a_command_makes_no_use_of_are_refused),
        cmocka_unit_test(what_nobody_could_read_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
