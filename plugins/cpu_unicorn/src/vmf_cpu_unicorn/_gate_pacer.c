/* The pacer: one native thread a gate that ends slices, on a deadline or a kick, and never needs the GIL.
 *
 * uc_emu_stop() from another thread is forgotten when it comes before uc_emu_start() has begun: so it is repeated until
 * the slice has ended. A kick that finds the engine at work need not wake the pacer for that: waking a thread costs more
 * than the rest of the kick. Should the engine miss it all the same, the pacer sees it when it next wakes, soon.
 * `lock` is only ever held for a few instructions, and never while taking the GIL.
 */
#include "_gate.h"

#define RETRY_NS 200000
#define SOON_NS 5000000

static void sleep_until(Gate *g, int64_t when)
{
    g->asleep_until = when;
    if (when == INT64_MAX) {
        pthread_cond_wait(&g->wake, &g->lock);
    } else {
        struct timespec t = {when / 1000000000, when % 1000000000};
        pthread_cond_timedwait(&g->wake, &g->lock, &t);
    }
}

static void *pacer_main(void *argument)
{
    Gate *g = argument;
    pthread_mutex_lock(&g->lock);
    while (!g->quit) {
        if (!g->in_slice) {
            sleep_until(g, INT64_MAX);
            continue;
        }
        int64_t now = now_ns();
        if (atomic_load(&g->kicked) || now >= g->deadline) {
            engine_stop(g);
            sleep_until(g, now + RETRY_NS);
        } else {
            sleep_until(g, g->deadline);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

bool pacer_start(Gate *g)
{
    pthread_condattr_t attributes;
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&g->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    g->asleep_until = INT64_MAX;
    g->pacer_runs = pthread_create(&g->pacer, NULL, pacer_main, g) == 0;
    return g->pacer_runs;
}

void pacer_stop(Gate *g)
{
    if (!g->pacer_runs)
        return;
    g->pacer_runs = false;
    pthread_mutex_lock(&g->lock);
    g->quit = true;
    pthread_cond_signal(&g->wake);
    pthread_mutex_unlock(&g->lock);
    Py_BEGIN_ALLOW_THREADS
    pthread_join(g->pacer, NULL);
    Py_END_ALLOW_THREADS
}

void pacer_begin_slice(Gate *g, int64_t deadline)
{
    pthread_mutex_lock(&g->lock);
    atomic_store_explicit(&g->entered, false, memory_order_relaxed);
    g->in_slice = true;
    g->deadline = deadline;
    if (deadline < g->asleep_until || atomic_load(&g->kicked))
        pthread_cond_signal(&g->wake);
    pthread_mutex_unlock(&g->lock);
}

void pacer_end_slice(Gate *g)
{
    pthread_mutex_lock(&g->lock);
    g->in_slice = false;
    pthread_mutex_unlock(&g->lock);
}

void pacer_kick(Gate *g)
{
    atomic_store(&g->kicked, true);
    if (!g->pacer_runs)
        return;
    pthread_mutex_lock(&g->lock);
    if (g->in_slice) {
        engine_stop(g);
        bool soon = g->asleep_until != INT64_MAX && g->asleep_until < now_ns() + SOON_NS;
        if (!soon || !atomic_load_explicit(&g->entered, memory_order_relaxed))
            pthread_cond_signal(&g->wake);
    }
    pthread_mutex_unlock(&g->lock);
}
