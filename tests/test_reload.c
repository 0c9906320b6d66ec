/* Each key that the table says can change while the daemon runs is taken when it does. */
#include "test_util.h"

#include "reload.h"

static void every_key_that_reloads_is_taken(void **state)
{
    (void)state;
    const ts_config_section *const sections[] = {&ts_config_daemon, &ts_config_pools};
    uint32_t reload = 0;
    for (size_t i = 0; i < 2; i++)
        for (uint32_t k = 0; k < sections[i]->num_keys; k++) {
            const ts_config_key *key = &sections[i]->keys[k];
            if (key->reloads && !ts_reload_takes(sections[i], key))
                fail_msg("%s reloads, and nothing takes it", key->name);
            reload += key->reloads;
        }
    assert_true(reload > 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_key_that_reloads_is_taken)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
