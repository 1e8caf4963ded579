/*
 * Preloaded into QEMU: its clocks go FACTOR times slower than the world's (VMF_LAB_SLOWDOWN in the environment).
 * See slowclock.py for why, and for what stays as it is: the time stamp counter, which no library can intercept.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define NS 1000000000LL
#define LONGEST (1000000 * NS)

typedef int gettime_function(clockid_t, struct timespec *);
typedef int ppoll_function(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);

static gettime_function *real_gettime;
static ppoll_function *real_ppoll;
static int64_t factor = 1;
static int64_t start[2]; /* CLOCK_REALTIME and CLOCK_MONOTONIC when this library came in */

static int64_t ns_of(const struct timespec *time) { return time->tv_sec * NS + time->tv_nsec; }

static struct timespec timespec_of(int64_t ns) { return (struct timespec){ns / NS, ns % NS}; }

__attribute__((constructor)) static void prepare(void)
{
	const char *text = getenv("VMF_LAB_SLOWDOWN");
	if (real_gettime)
		return;
	real_ppoll = (ppoll_function *)dlsym(RTLD_NEXT, "ppoll");
	real_gettime = (gettime_function *)dlsym(RTLD_NEXT, "clock_gettime");
	if (text && atoi(text) > 1)
		factor = atoi(text);
	for (clockid_t clock = CLOCK_REALTIME; clock <= CLOCK_MONOTONIC; clock++) {
		struct timespec now;
		real_gettime(clock, &now);
		start[clock] = ns_of(&now);
	}
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	prepare();
	int result = real_gettime(clock, now);
	if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_MONOTONIC))
		*now = timespec_of(start[clock] + (ns_of(now) - start[clock]) / factor);
	return result;
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
	struct timespec longer;
	prepare();
	if (timeout) {
		int64_t ns = timeout->tv_sec > 1000000 ? LONGEST : ns_of(timeout);
		longer = timespec_of(ns * factor);
		timeout = &longer;
	}
	return real_ppoll(fds, count, timeout, mask);
}

/* What glibc's headers make of ppoll when _FORTIFY_SOURCE is on. */
int __ppoll_chk(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask, size_t size)
{
	(void)size;
	return ppoll(fds, count, timeout, mask);
}
