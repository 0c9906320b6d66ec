/* What an executor of a GPU holds: in which order, and whose turn it is. */
#include "test_util.h"

#include "held_runs.h"

#define PAGES 3u
#define JOBS 4u /* of each session, and of none */

typedef struct rig {
    ts_held_runs held;
    ts_signals_page pages[PAGES];
    ts_job jobs[PAGES + 1][JOBS]; /* the last ones: of no session */
} rig;

static void rig_new(rig *r)
{
    memset(r, 0, sizeof *r);
    for (uint32_t p = 0; p < PAGES; p++)
        for (uint32_t i = 0; i < JOBS; i++)
            r->jobs[p][i].signals = &r->pages[p];
}

static ts_held_queue *queue(rig *r, uint32_t place)
{
    return place < PAGES ? &r->pages[place].held : &r->held.others;
}

/* The queue holds these jobs of its own, and no others. */
static void assert_holds(rig *r, uint32_t place, const char *numbers)
{
    const ts_job *last = NULL;
    for (const ts_job *job = queue(r, place)->first; job != NULL; job = job->next, numbers++) {
        assert_int_not_equal(*numbers, 0);
        assert_ptr_equal(job, &r->jobs[place][*numbers - '0']);
        last = job;
    }
    assert_int_equal(*numbers, 0);
    if (last != NULL)
        assert_ptr_equal(queue(r, place)->last, last);
}

/* These queues are listed, in this order, forward and back. */
static void assert_listed(rig *r, const char *places)
{
    const ts_held_queue *before = NULL;
    for (const ts_held_queue *q = r->held.first; q != NULL; q = q->next, places++) {
        assert_int_not_equal(*places, 0);
        assert_ptr_equal(q, queue(r, (uint32_t)(*places - '0')));
        assert_ptr_equal(q->prev, before);
        before = q;
    }
    assert_int_equal(*places, 0);
    assert_ptr_equal(r->held.last, before);
}

static void add(rig *r, uint32_t place, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        ts_held_add(&r->held, &r->jobs[place][i]);
}

static void queues_have_an_order_of_their_own_and_take_turns(void **state)
{
    (void)state;
    rig r;
    rig_new(&r);
    assert_listed(&r, "");
    add(&r, 1, 3);
    assert_listed(&r, "1");
    ts_held_turn(&r.held); /* there is no other */
    assert_listed(&r, "1");
    add(&r, 3, 2);
    add(&r, 0, 1);
    assert_listed(&r, "130");
    ts_held_turn(&r.held);
    assert_listed(&r, "301");
    ts_held_turn(&r.held);
    assert_listed(&r, "013");
    assert_holds(&r, 1, "012");
    assert_holds(&r, 3, "01");
    assert_holds(&r, 0, "0");
}

static void what_is_taken_is_gone_from_wherever_it_was(void **state)
{
    (void)state;
    rig r;
    rig_new(&r);
    add(&r, 0, 1);
    add(&r, 3, 4);
    add(&r, 2, 2);
    ts_job *jobs = r.jobs[3];
    ts_held_take(&r.held, &jobs[0], &jobs[1]); /* from the middle, */
    assert_null(jobs[1].next);
    assert_holds(&r, 3, "023");
    ts_held_take(&r.held, &jobs[2], &jobs[3]); /* ... the end */
    assert_holds(&r, 3, "02");
    ts_held_add(&r.held, &jobs[1]);
    assert_holds(&r, 3, "021");
    ts_held_take(&r.held, NULL, &jobs[0]); /* ... and the beginning */
    assert_holds(&r, 3, "21");
    assert_listed(&r, "032");
    ts_held_take(&r.held, NULL, &jobs[2]);
    ts_held_take(&r.held, NULL, &jobs[1]); /* which leaves nothing */
    assert_listed(&r, "02");
    ts_held_take(&r.held, NULL, &r.jobs[0][0]);
    assert_listed(&r, "2");
    add(&r, 3, 2);
    assert_holds(&r, 3, "01");
    assert_listed(&r, "23");
    ts_held_take(&r.held, NULL, &r.jobs[2][0]);
    ts_held_take(&r.held, NULL, &r.jobs[2][1]);
    ts_held_take(&r.held, NULL, &jobs[0]);
    ts_held_take(&r.held, NULL, &jobs[1]);
    assert_listed(&r, "");
}

static void what_is_put_back_comes_before_what_is_there(void **state)
{
    (void)state;
    rig r;
    rig_new(&r);
    add(&r, 3, 4);
    add(&r, 0, 2);
    add(&r, 1, 1);
    ts_job *taken[] = {&r.jobs[1][0], &r.jobs[3][0], &r.jobs[0][0], &r.jobs[3][1]};
    for (uint32_t i = 0; i < 4; i++) {
        ts_held_take(&r.held, NULL, taken[i]);
        if (i > 0)
            taken[i - 1]->next = taken[i];
    }
    assert_listed(&r, "30");
    ts_held_put_back(&r.held, taken[0]);
    assert_holds(&r, 3, "0123");
    assert_holds(&r, 0, "01");
    assert_holds(&r, 1, "0");
    assert_listed(&r, "301");
    ts_held_add(&r.held, &r.jobs[1][1]); /* behind it, as ever */
    assert_holds(&r, 1, "01");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(queues_have_an_order_of_their_own_and_take_turns),
        cmocka_unit_test(what_is_taken_is_gone_from_wherever_it_was),
        cmocka_unit_test(what_is_put_back_comes_before_what_is_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
