/* Threads that share the work of one pass.
 *
 * The owner shares out a task's parts one after the other; whoever is free takes the next, the owner too. So the owner
 * waits for a helper only while that works on a part: one that sleeps, or that the system has put aside, delays nobody.
 * Who takes a part makes no difference to what it computes.
 */
#ifndef POOL_H
#define POOL_H
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define MOST_THREADS 64
#define SPINS 2000 /* before a thread that waits during a pass lets others run: some tens of microseconds */

typedef void (*Part)(const void *pass, int64_t part, int64_t worker);

typedef struct Pool Pool;
typedef struct {
    Pool *pool;
    int64_t number; /* from 1 on; the owner is worker 0 */
    pthread_t thread;
} Helper;

struct Pool {
    /* Written by the owner before `left`; stable while a part that was taken is not done. */
    Part task;
    const void *pass;
    int64_t parts; /* taken in order: what is fetched ahead of a part is the beginning of the next */
    _Alignas(64) atomic_int_fast64_t left; /* parts that nobody has taken */
    _Alignas(64) atomic_int_fast64_t undone;
    _Alignas(64) atomic_int is_active; /* a pass is under way: helpers look for parts and do not sleep */
    int is_over;                       /* guarded by the lock, as is every change of is_active */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int64_t num_helpers;
    Helper helpers[MOST_THREADS];
};

static inline void relax(int64_t *spins) {
    if (++*spins % SPINS == 0) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Take parts until none is left; 0 if none was. */
static int take_parts(Pool *pool, int64_t worker) {
    int has_worked = 0;
    int_fast64_t left = atomic_load_explicit(&pool->left, memory_order_relaxed);
    while (left > 0) {
        if (!atomic_compare_exchange_weak_explicit(&pool->left, &left, left - 1, memory_order_acquire,
                                                   memory_order_relaxed))
            continue;
        pool->task(pool->pass, pool->parts - left, worker);
        atomic_fetch_sub_explicit(&pool->undone, 1, memory_order_release);
        has_worked = 1;
        left = atomic_load_explicit(&pool->left, memory_order_relaxed);
    }
    return has_worked;
}

static void *help(void *argument) {
    Helper *self = argument;
    Pool *pool = self->pool;
    int64_t spins = 0;
    for (;;) {
        if (take_parts(pool, self->number)) spins = 0;
        if (atomic_load_explicit(&pool->is_active, memory_order_relaxed)) {
            relax(&spins);
            continue;
        }
        pthread_mutex_lock(&pool->lock);
        while (!atomic_load_explicit(&pool->is_active, memory_order_relaxed) && !pool->is_over)
            pthread_cond_wait(&pool->wake, &pool->lock);
        int is_over = pool->is_over;
        pthread_mutex_unlock(&pool->lock);
        if (is_over) return 0;
    }
}

/* Run a task's parts, in any order, and return when all are done. `pool` may be null. */
static void share(Pool *pool, Part task, const void *pass, int64_t parts) {
    if (!pool || parts == 1) {
        for (int64_t i = 0; i < parts; i++) task(pass, i, 0);
        return;
    }
    pool->task = task;
    pool->pass = pass;
    pool->parts = parts;
    atomic_store_explicit(&pool->undone, parts, memory_order_relaxed);
    atomic_store_explicit(&pool->left, parts, memory_order_release);
    take_parts(pool, 0);
    for (int64_t spins = 0; atomic_load_explicit(&pool->undone, memory_order_acquire) > 0;) relax(&spins);
}

static void set_active(Pool *pool, int is_active) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store_explicit(&pool->is_active, is_active, memory_order_relaxed);
    if (is_active) pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static int64_t num_workers(const Pool *pool) { return pool ? pool->num_helpers + 1 : 1; }

/* End the helpers. No pass is under way, and none follows. */
void stop_pool(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->is_over = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int64_t i = 0; i < pool->num_helpers; i++) pthread_join(pool->helpers[i].thread, 0);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* A pool of 2 threads or more, the calling one included; null if the system has not so many. */
Pool *start_pool(int64_t num_threads) {
    if (num_threads < 2 || num_threads > MOST_THREADS) return 0;
    Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!pool) return 0;
    *pool = (Pool){0};
    pthread_mutex_init(&pool->lock, 0);
    pthread_cond_init(&pool->wake, 0);
    for (int64_t i = 0; i < num_threads - 1; i++) {
        Helper *helper = &pool->helpers[i];
        helper->pool = pool;
        helper->number = i + 1;
        if (pthread_create(&helper->thread, 0, help, helper)) {
            stop_pool(pool);
            return 0;
        }
        pool->num_helpers++;
    }
    return pool;
}

#endif
