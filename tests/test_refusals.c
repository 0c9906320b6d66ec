/* Refused requests are counted by what they are. */
#include "test_util.h"

#include "refusals.h"

typedef struct told {
    uint32_t names, unknown;
} told;

static void note(void *arg, const char *operation, const char *pool, const char *status,
                 uint64_t count)
{
    told *t = arg;
    const ProtobufCFieldDescriptor *field =
        protobuf_c_message_descriptor_get_field_by_name(&tspb__request__descriptor, operation);
    assert_string_equal(pool, "");
    assert_string_equal(status, "TS_EINVAL");
    if (field == NULL) {
        assert_string_equal(operation, "unknown");
        assert_int_equal(count, 1);
        t->unknown++;
    } else {
        assert_int_equal(count, field->id);
        t->names++;
    }
}

static void each_request_that_there_is_has_a_count(void **state)
{
    (void)state;
    const ProtobufCMessageDescriptor *d = &tspb__request__descriptor;
    static ts_service s;
    ts_engine_limits limits;
    told t = {0, 0};
    uint32_t requests = 0;
    ts_engine_default_limits(&limits);
    limits.sessions = 1;
    s.exec.engine = ts_engine_new(&limits);
    for (unsigned i = 0; i < d->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &d->fields[i];
        if (f->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        requests++;
        for (uint32_t n = 0; n < f->id; n++)
            ts_refused_in(&s, (Tspb__Request__BodyCase)f->id, TS_NONE, TS_EINVAL);
    }
    ts_refused(&s, NULL, TS_EINVAL);
    ts_refusals_each(&s, note, &t);
    assert_true(requests > 30);
    assert_int_equal(t.names, requests);
    assert_int_equal(t.unknown, 1);
    free(s.refusals);
    ts_engine_free(s.exec.engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_request_that_there_is_has_a_count)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
