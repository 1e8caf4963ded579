/*
 * A guest program that checks itself while its machine is being moved about.
 *
 *   selfcheck run [-m MIB] [-r MIB_PER_S] [-t TICK_MS] [-p PAUSE_MS]
 *   selfcheck dirty MIB_PER_S [MIB]     write to pages at a steady rate, for ever
 *   selfcheck fill MIB                  fill memory with incompressible data, say so, and idle
 *   selfcheck beat US                   write one byte to the console every US microseconds, and sleep in between
 *
 * "run" starts one process for each thing that must survive: integer arithmetic, x87 arithmetic, SSE arithmetic, a walk
 * over memory (MIB of it, at MIB_PER_S; 0 = as fast as it goes), fork and pipes, signals and interval timers, and the
 * clocks. Each repeats its work and compares with what it must be. The parent alone writes to the console:
 *
 *   tick N C          every TICK_MS; N counts from 1, C = checksum over all N so far, eight hex digits
 *   clock M R         once a second: CLOCK_MONOTONIC and CLOCK_REALTIME in nanoseconds
 *   selfcheck: ok rounds=N errors=0        once a second ("selfcheck: FAILED ..." after the first error)
 *   MISMATCH WHO WHAT                      at once
 *
 * so that every lost, repeated or altered byte shows in what the hosts received (vmf.testing.serial_check).
 * PAUSE_MS is how long each process sleeps between two rounds (default 0: the processor is always busy).
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { INTEGER, X87, SSE, MEMORY, FORK, SIGNALS, CLOCKS, WORKERS };
static const char *const names[WORKERS] = {"integer", "x87", "sse", "memory", "fork", "signals", "clocks"};

static volatile uint64_t *rounds; /* shared: finished rounds of each worker */
static int report_fd = -1;
static int self = -1;
static unsigned pause_ms;
static const uint64_t GOLD = 0x9E3779B97F4A7C15ull;

/* Otherwise the compiler does the work once, before the loop around it. */
#define NOT_HOISTED __attribute__((noipa))

static int64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_ns(int64_t ns)
{
	struct timespec t = {ns / 1000000000, ns % 1000000000};
	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t) == EINTR)
		;
}

/* One line of less than PIPE_BUF bytes, so it is never mixed with another worker's. */
static void mismatch(const char *format, ...)
{
	char line[256];
	int n = snprintf(line, sizeof line, "MISMATCH %s ", names[self]);
	va_list args;
	va_start(args, format);
	n += vsnprintf(line + n, sizeof line - n - 1, format, args);
	va_end(args);
	if (n > (int)sizeof line - 2)
		n = sizeof line - 2;
	line[n++] = '\n';
	if (write(report_fd, line, n) != n)
		_exit(99);
}

static void round_done(void)
{
	rounds[self]++;
	if (pause_ms)
		sleep_ns(pause_ms * 1000000ll);
}

/* --- arithmetic --------------------------------------------------------------------------------------------- */

NOT_HOISTED static uint64_t integer_work(uint64_t x)
{
	uint64_t sum = 0;
	for (unsigned i = 1; i < 20000; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		sum = (sum << 5 | sum >> 59) ^ x * GOLD;
		sum += x / (i | 1) + (uint64_t)((int64_t)x % (int64_t)(i + 7));
		unsigned __int128 wide = (unsigned __int128)x * sum;
		sum ^= (uint64_t)(wide >> 64);
	}
	return sum;
}

static void integer_worker(void)
{
	const uint64_t want = 0x708811ceb1b2a95cull; /* computed on real hardware */
	for (;;) {
		uint64_t got = integer_work(88172645463325252ull);
		if (got != want)
			mismatch("%016llx instead of %016llx", (unsigned long long)got, (unsigned long long)want);
		round_done();
	}
}

NOT_HOISTED static long double x87_work(void)
{
	long double a = 1.0L, b = 3.0L, c = 0.5L;
	for (unsigned i = 1; i < 20000; i++) {
		long double d;
		a = a * 1.0000001L + b / (long double)i;
		__asm__ volatile("fsqrt" : "=t"(d) : "0"(a));
		b = b - c * d / 1024.0L;
		c = (c + a) / (1.0L + d);
	}
	return a + b * c;
}

static void x87_worker(void)
{
	long double want = x87_work();
	for (;;) {
		long double got = x87_work();
		if (memcmp(&got, &want, 10))
			mismatch("%.20Lg instead of %.20Lg", got, want);
		unsigned short control;
		__asm__ volatile("fnstcw %0" : "=m"(control));
		if (control != 0x037F)
			mismatch("control word %04x", control);
		round_done();
	}
}

NOT_HOISTED static void sse_work(double out[2], uint64_t bits[2])
{
	__m128d a = _mm_set_pd(1.25, 0.75), b = _mm_set_pd(3.0, 5.0);
	__m128i x = _mm_set_epi64x(0x0123456789abcdefll, (long long)GOLD);
	const __m128i k = _mm_set_epi32(7, 0x55555555, 13, 0x33333333);
	for (unsigned i = 1; i < 20000; i++) {
		__m128d n = _mm_set1_pd(i);
		a = _mm_add_pd(_mm_mul_pd(a, _mm_set1_pd(1.0000003)), _mm_div_pd(b, n));
		b = _mm_sub_pd(_mm_sqrt_pd(a), _mm_shuffle_pd(b, b, 1));
		x = _mm_add_epi32(_mm_xor_si128(x, _mm_slli_epi64(x, 7)), k);
		x = _mm_xor_si128(_mm_mul_epu32(x, k), _mm_shuffle_epi32(x, 0x1B));
	}
	_mm_storeu_pd(out, _mm_add_pd(a, b));
	_mm_storeu_si128((__m128i *)bits, x);
}

static void sse_worker(void)
{
	double want[2], got[2];
	uint64_t wantbits[2], gotbits[2];
	sse_work(want, wantbits);
	for (;;) {
		sse_work(got, gotbits);
		if (memcmp(got, want, 16) || memcmp(gotbits, wantbits, 16))
			mismatch("%.17g %.17g instead of %.17g %.17g", got[0], got[1], want[0], want[1]);
		unsigned csr = _mm_getcsr();
		if ((csr & ~0x3Fu) != 0x1F80)
			mismatch("mxcsr %08x", csr);
		round_done();
	}
}

/* --- memory ------------------------------------------------------------------------------------------------- */

/* Every page: word i holds page * GOLD + generation * 2^32 + i. Check the old generation, write the next one. */
static void memory_worker(unsigned mib, unsigned rate)
{
	size_t pages = (size_t)mib << 8;
	uint64_t *memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		mismatch("no memory for %u MiB", mib);
		return;
	}
	int64_t begin = now(CLOCK_MONOTONIC);
	uint64_t walked = 0;
	for (uint64_t generation = 0;; generation++) {
		for (size_t page = 0; page < pages; page++) {
			uint64_t *word = memory + (page << 9);
			uint64_t old = page * GOLD + ((generation - 1) << 32), new = page * GOLD + (generation << 32);
			for (unsigned i = 0; i < 512; i++) {
				if (generation && word[i] != old + i)
					mismatch("page %zu word %u generation %llu: %016llx instead of %016llx", page, i,
						 (unsigned long long)generation, (unsigned long long)word[i],
						 (unsigned long long)(old + i));
				word[i] = new + i;
			}
			if (rate && ++walked % 16 == 0) {
				int64_t due = begin + (int64_t)(walked * (1000000000ull >> 8) / rate);
				int64_t left = due - now(CLOCK_MONOTONIC);
				if (left > 0)
					sleep_ns(left);
				else if (left < -1000000000) { /* cannot keep up: do not run after it */
					begin = now(CLOCK_MONOTONIC);
					walked = 0;
				}
			}
		}
		round_done();
	}
}

/* --- processes, pipes --------------------------------------------------------------------------------------- */

static void fork_worker(void)
{
	for (unsigned n = 0;; n++) {
		int down[2], up[2], status = -1;
		if (pipe(down) || pipe(up)) {
			mismatch("pipe: %s", strerror(errno));
			return;
		}
		pid_t child = fork();
		if (child == 0) {
			unsigned char block[4096];
			unsigned sum = 0;
			ssize_t got;
			close(down[1]);
			while ((got = read(down[0], block, sizeof block)) > 0)
				for (ssize_t i = 0; i < got; i++)
					sum = sum * 31 + block[i];
			if (write(up[1], &sum, sizeof sum) != sizeof sum)
				_exit(98);
			_exit(n & 0x3F);
		}
		if (child < 0) {
			mismatch("fork: %s", strerror(errno));
			return;
		}
		close(down[0]);
		close(up[1]);
		unsigned want = 0, got = 0;
		for (unsigned block = 0; block < 5; block++) {
			unsigned char bytes[3000];
			for (unsigned i = 0; i < sizeof bytes; i++) {
				bytes[i] = (unsigned char)((n + block) * 7 + i * 13);
				want = want * 31 + bytes[i];
			}
			if (write(down[1], bytes, sizeof bytes) != sizeof bytes)
				mismatch("short write to a pipe");
		}
		close(down[1]);
		if (read(up[0], &got, sizeof got) != sizeof got || got != want)
			mismatch("pipe sum %08x instead of %08x", got, want);
		close(up[0]);
		if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != (int)(n & 0x3F))
			mismatch("child status %x instead of %x", status, (n & 0x3F) << 8);
		round_done();
	}
}

/* --- signals and timers ------------------------------------------------------------------------------------- */

static volatile sig_atomic_t alarms;
static volatile int signal_value, signal_count;

static void on_alarm(int number)
{
	(void)number;
	alarms++;
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	signal_value = info->si_value.sival_int;
	signal_count++;
}

static void signal_worker(void)
{
	struct sigaction alarm_action = {.sa_handler = on_alarm};
	struct sigaction signal_action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
	struct itimerval every = {{0, 20000}, {0, 20000}};
	sigaction(SIGALRM, &alarm_action, NULL);
	sigaction(SIGUSR1, &signal_action, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	for (int n = 0;; n++) {
		int before = signal_count;
		sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = n});
		if (signal_count != before + 1 || signal_value != n)
			mismatch("signal %d arrived as %d, count %d instead of %d", n, signal_value, signal_count, before + 1);
		if (n % 200 == 199) {
			/* the interval timer still fires, and time has passed when it does */
			int64_t begin = now(CLOCK_MONOTONIC); /* first: an alarm in between is one of the three */
			int seen = alarms;
			while (alarms < seen + 3)
				pause();
			int64_t passed = now(CLOCK_MONOTONIC) - begin;
			if (passed < 19000000) /* the first may be late, but not the two after it early */
				mismatch("three alarms of 20 ms within %lld ns", (long long)passed);
			round_done();
		}
	}
}

/* --- clocks ------------------------------------------------------------------------------------------------- */

static void clock_worker(void)
{
	int64_t monotonic = now(CLOCK_MONOTONIC), real = now(CLOCK_REALTIME);
	for (;;) {
		for (unsigned i = 0; i < 20000; i++) {
			int64_t m = now(CLOCK_MONOTONIC), r = now(CLOCK_REALTIME);
			if (m < monotonic)
				mismatch("CLOCK_MONOTONIC went back by %lld ns", (long long)(monotonic - m));
			if (r < real)
				mismatch("CLOCK_REALTIME went back by %lld ns", (long long)(real - r));
			monotonic = m;
			real = r;
		}
		int64_t begin = now(CLOCK_MONOTONIC);
		sleep_ns(5000000);
		if (now(CLOCK_MONOTONIC) - begin < 5000000)
			mismatch("a sleep of 5 ms was shorter");
		round_done();
	}
}

/* --- the parent --------------------------------------------------------------------------------------------- */

static void say(const char *text, size_t size)
{
	while (size) {
		ssize_t n = write(1, text, size);
		if (n < 0 && errno != EINTR)
			_exit(97);
		if (n > 0) {
			text += n;
			size -= n;
		}
	}
}

static int run(unsigned mib, unsigned rate, unsigned tick_ms)
{
	pid_t children[WORKERS];
	int reports[2];
	char line[256];
	unsigned long errors = 0;
	uint32_t checksum = 0;

	rounds = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (rounds == MAP_FAILED || pipe2(reports, O_NONBLOCK) != 0)
		return 1;
	for (int worker = 0; worker < WORKERS; worker++) {
		children[worker] = fork();
		if (children[worker] == 0) {
			self = worker;
			report_fd = reports[1];
			switch (worker) {
			case INTEGER: integer_worker(); break;
			case X87: x87_worker(); break;
			case SSE: sse_worker(); break;
			case MEMORY: memory_worker(mib, rate); break;
			case FORK: fork_worker(); break;
			case SIGNALS: signal_worker(); break;
			case CLOCKS: clock_worker(); break;
			}
			_exit(1);
		}
	}
	struct timespec due;
	clock_gettime(CLOCK_MONOTONIC, &due);
	for (unsigned long tick = 1;; tick++) {
		ssize_t got;
		int status;
		while ((got = read(reports[0], line, sizeof line)) > 0) {
			for (ssize_t i = 0; i < got; i++)
				errors += line[i] == '\n';
			say(line, got);
		}
		for (pid_t gone; (gone = waitpid(-1, &status, WNOHANG)) > 0;)
			for (int worker = 0; worker < WORKERS; worker++)
				if (children[worker] == gone) {
					errors++;
					say(line, snprintf(line, sizeof line, "MISMATCH %s ended with status %x\n", names[worker],
							   status));
				}
		checksum = checksum * 1664525u + 1013904223u + (uint32_t)tick;
		say(line, snprintf(line, sizeof line, "tick %lu %08x\n", tick, checksum));
		if (tick % (1000 / tick_ms ? 1000 / tick_ms : 1) == 0) {
			unsigned long long sum = 0, least = ~0ull;
			for (int worker = 0; worker < WORKERS; worker++) {
				sum += rounds[worker];
				if (rounds[worker] < least)
					least = rounds[worker];
			}
			say(line, snprintf(line, sizeof line, "clock %lld %lld\n", (long long)now(CLOCK_MONOTONIC),
					   (long long)now(CLOCK_REALTIME)));
			say(line, snprintf(line, sizeof line, "selfcheck: %s rounds=%llu least=%llu errors=%lu\n",
					   errors ? "FAILED" : "ok", sum, least, errors));
		}
		due.tv_nsec += tick_ms * 1000000l;
		due.tv_sec += due.tv_nsec / 1000000000;
		due.tv_nsec %= 1000000000;
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
			;
	}
}

static uint64_t *take(size_t mib)
{
	uint64_t *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		printf("no memory for %zu MiB\n", mib);
		exit(1);
	}
	return memory;
}

static void fill(uint64_t *memory, size_t mib)
{
	uint64_t x = 88172645463325252ull;
	for (size_t i = 0; i < mib << 17; i += 4) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		memory[i] = x;
		memory[i + 1] = x * GOLD;
		memory[i + 2] = (x + 1) * 0xD1342543DE82EF95ull;
		memory[i + 3] = ~x * 0xAF251AF3B0F025B5ull;
	}
}

__attribute__((noreturn)) static void dirty(unsigned rate, size_t mib)
{
	uint64_t *memory = take(mib), count = 0, paced = 0;
	size_t pages = mib << 8;
	fill(memory, mib);
	printf("dirtying %u MiB/s over %zu MiB\n", rate, mib);
	int64_t begin = now(CLOCK_MONOTONIC);
	for (;;) {
		memory[(count % pages) << 9] = count * GOLD;
		count++;
		if (++paced % 64 == 0) {
			int64_t left = begin + (int64_t)(paced * (1000000000ull >> 8) / rate) - now(CLOCK_MONOTONIC);
			if (left > 0)
				sleep_ns(left);
			else if (left < -1000000000) {
				begin = now(CLOCK_MONOTONIC);
				paced = 0;
			}
		}
	}
}

__attribute__((noreturn)) static void beat(int64_t us)
{
	printf("beating every %lld us\n", (long long)us);
	for (;;) {
		sleep_ns(us * 1000);
		say(".", 1);
	}
}

int main(int argc, char **argv)
{
	unsigned mib = 8, rate = 16, tick_ms = 100;
	setvbuf(stdout, NULL, _IONBF, 0);
	if (argc >= 3 && !strcmp(argv[1], "dirty") && atoi(argv[2]) > 0)
		dirty(atoi(argv[2]), argc > 3 ? atoi(argv[3]) : 128);
	if (argc == 3 && !strcmp(argv[1], "beat") && atoi(argv[2]) > 0)
		beat(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "fill")) {
		fill(take(atoi(argv[2])), atoi(argv[2]));
		printf("filled %s MiB\n", argv[2]);
		for (;;)
			pause();
	}
	if (argc == 2 && !strcmp(argv[1], "golden")) {
		printf("%016llx\n", (unsigned long long)integer_work(88172645463325252ull));
		return 0;
	}
	if (argc >= 2 && !strcmp(argv[1], "run")) {
		int option;
		while ((option = getopt(argc - 1, argv + 1, "m:r:t:p:")) > 0)
			switch (option) {
			case 'm': mib = atoi(optarg); break;
			case 'r': rate = atoi(optarg); break;
			case 't': tick_ms = atoi(optarg); break;
			case 'p': pause_ms = atoi(optarg); break;
			default: return 2;
			}
		if (mib && tick_ms)
			return run(mib, rate, tick_ms);
	}
	fputs("usage: selfcheck run [-m MIB] [-r MIB/S] [-t TICK_MS] [-p PAUSE_MS] | dirty MIB/S [MIB] | fill MIB | beat US\n",
	      stderr);
	return 2;
}
