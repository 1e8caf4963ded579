/*
 * A guest program that checks disks, and measures them.
 *
 *   diskcheck check DEVICE [-m MIB] [-w WORKERS] [-z]
 *       WORKERS processes write, flush, read back and (with -z) zero and discard random blocks of their own parts of
 *       the first MIB of the device, past the page cache, for ever. Every block carries its number and generation;
 *       what is read must be what was acknowledged last. The parent alone writes to the console:
 *           diskcheck: ok rounds=N writes=N reads=N errors=0     twice a second ("FAILED" after the first error)
 *           MISMATCH block B: ...                                at once
 *   diskcheck stamp DEVICE BLOCKS
 *       Writes blocks 0, 1, 2, ... (around after BLOCKS), flushes after each, and says "stamped N" once block N is
 *       durable: what was said must be there after the machine was killed.
 *   diskcheck verify DEVICE BLOCKS N
 *       Says "verify: ok" when every block that "stamp" acknowledged up to N is there.
 *   diskcheck bench DEVICE MIB SECONDS
 *       Sequential (1 MiB, depth 4) and random (4 KiB, depths 1 and 16) reads and writes past the page cache, and
 *       sequential ones through it; a line "bench NAME VALUE UNIT" for each.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t next(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static void die(const char *what)
{
	printf("diskcheck: FAILED %s: %s\n", what, strerror(errno));
	fflush(stdout);
	exit(1);
}

static void *aligned(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static void fill(uint64_t *block, uint64_t number, uint64_t generation)
{
	uint64_t state = (number << 32 ^ generation) * 0x9E3779B97F4A7C15ull | 1;
	block[0] = number;
	block[1] = generation;
	for (int n = 2; n < WORDS; n++)
		block[n] = next(&state);
}

/* What of the block is not as it must be: the word's number, or -1. Generation 0 is all zeroes. */
static int wrong(const uint64_t *block, uint64_t number, uint64_t generation)
{
	static uint64_t expected[WORDS];
	if (generation)
		fill(expected, number, generation);
	else
		memset(expected, 0, BLOCK);
	for (int n = 0; n < WORDS; n++)
		if (block[n] != expected[n])
			return n;
	return -1;
}

/* ---- check ---- */

static struct shared {
	volatile uint64_t rounds, writes, reads, errors;
} *shared;

#define UNKNOWN UINT32_MAX
#define BURST 16

static void check_worker(const char *device, uint64_t first, uint64_t count, uint64_t seed, int zeroes)
{
	int fd = open(device, O_RDWR | O_DIRECT);
	uint32_t *generations = calloc(count, sizeof *generations);
	uint64_t *buffer = aligned(BURST * BLOCK);
	uint32_t generation = 1;
	if (fd < 0)
		die(device);
	for (uint64_t n = 0; n < count; n++)
		generations[n] = UNKNOWN;
	for (;;) {
		uint64_t length = next(&seed) % BURST + 1, at = next(&seed) % (count - BURST), what = next(&seed) % 100;
		uint64_t range[2] = {(first + at) * BLOCK, length * BLOCK};
		if (what < 45) {
			generation++;
			for (uint64_t n = 0; n < length; n++)
				fill(buffer + n * WORDS, first + at + n, generation);
			if (pwrite(fd, buffer, range[1], range[0]) != (ssize_t)range[1])
				die("write");
			for (uint64_t n = 0; n < length; n++)
				generations[at + n] = generation;
			shared->writes++;
		} else if (what < 90) {
			if (pread(fd, buffer, range[1], range[0]) != (ssize_t)range[1])
				die("read");
			for (uint64_t n = 0; n < length; n++) {
				int word;
				if (generations[at + n] == UNKNOWN)
					continue;
				word = wrong(buffer + n * WORDS, first + at + n, generations[at + n]);
				if (word >= 0) {
					shared->errors++;
					printf("MISMATCH block %llu: word %d is %016llx, number %llu generation %llu, not %u\n",
					       (unsigned long long)(first + at + n), word,
					       (unsigned long long)buffer[n * WORDS + word],
					       (unsigned long long)buffer[n * WORDS], (unsigned long long)buffer[n * WORDS + 1],
					       generations[at + n]);
					fflush(stdout);
				}
			}
			shared->reads++;
		} else if (what < 94) {
			if (fsync(fd))
				die("fsync");
		} else if (zeroes && what < 97) {
			if (ioctl(fd, BLKZEROOUT, range))
				die("BLKZEROOUT");
			for (uint64_t n = 0; n < length; n++)
				generations[at + n] = 0;
		} else if (zeroes) {
			if (ioctl(fd, BLKDISCARD, range) && errno != EOPNOTSUPP)
				die("BLKDISCARD");
			for (uint64_t n = 0; n < length; n++)
				generations[at + n] = UNKNOWN;
		}
		shared->rounds++;
	}
}

_Noreturn static void check(const char *device, uint64_t mib, int workers, int zeroes)
{
	uint64_t part = mib * (1 << 20) / BLOCK / workers;
	shared = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int n = 0; n < workers; n++)
		if (fork() == 0) {
			check_worker(device, n * part, part, 88172645463325252ull + n, zeroes);
			_exit(0);
		}
	for (;;) {
		usleep(500000);
		if (waitpid(-1, NULL, WNOHANG) > 0)
			shared->errors++;
		printf("diskcheck: %s rounds=%llu writes=%llu reads=%llu errors=%llu\n", shared->errors ? "FAILED" : "ok",
		       (unsigned long long)shared->rounds, (unsigned long long)shared->writes,
		       (unsigned long long)shared->reads, (unsigned long long)shared->errors);
		fflush(stdout);
	}
}

/* ---- stamp and verify ---- */

_Noreturn static void stamp(const char *device, uint64_t blocks)
{
	int fd = open(device, O_RDWR | O_DIRECT);
	uint64_t *buffer = aligned(BLOCK);
	if (fd < 0)
		die(device);
	for (uint64_t n = 0;; n++) {
		fill(buffer, n % blocks, n + 1);
		if (pwrite(fd, buffer, BLOCK, n % blocks * BLOCK) != BLOCK || fsync(fd))
			die("write");
		printf("stamped %llu\n", (unsigned long long)n);
		fflush(stdout);
	}
}

static int verify(const char *device, uint64_t blocks, uint64_t last)
{
	int fd = open(device, O_RDONLY | O_DIRECT);
	uint64_t *buffer = aligned(BLOCK);
	int bad = 0;
	if (fd < 0)
		die(device);
	for (uint64_t n = last < blocks ? 0 : last - blocks + 1; n <= last; n++) {
		if (pread(fd, buffer, BLOCK, n % blocks * BLOCK) != BLOCK)
			die("read");
		/* a later stamp that was not acknowledged any more is as good */
		if (buffer[1] < n + 1 || wrong(buffer, n % blocks, buffer[1]) >= 0) {
			printf("MISMATCH block %llu: generation %llu, not %llu\n", (unsigned long long)(n % blocks),
			       (unsigned long long)buffer[1], (unsigned long long)n + 1);
			bad = 1;
		}
	}
	printf(bad ? "verify: FAILED\n" : "verify: ok\n");
	fflush(stdout);
	return bad;
}

/* ---- bench ---- */

static void report(const char *name, double value, const char *unit)
{
	printf("bench %s %.1f %s\n", name, value, unit);
	fflush(stdout);
}

/* Keep `depth` requests of `size` bytes under way for `seconds`; requests a second. */
static double drive(int fd, uint64_t bytes, size_t size, int depth, int writing, int random, double seconds)
{
	aio_context_t context = 0;
	struct iocb blocks[64], *list[64];
	struct io_event events[64];
	uint64_t seed = 88172645463325252ull, position = 0, done = 0, count = bytes / size;
	char *buffer = aligned(depth * size);
	double begun, end;
	if (syscall(SYS_io_setup, depth, &context))
		die("io_setup");
	memset(buffer, 0x5a, depth * size);
	begun = now();
	end = begun + seconds;
	for (int n = 0; n < depth; n++)
		list[n] = &blocks[n];
	for (int ready = depth;;) {
		for (int n = 0; n < ready; n++) {
			struct iocb *b = list[n];
			uint64_t at = random ? next(&seed) % count : position++ % count;
			memset(b, 0, sizeof *b);
			b->aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
			b->aio_fildes = fd;
			b->aio_buf = (uintptr_t)(buffer + (b - blocks) * size);
			b->aio_nbytes = size;
			b->aio_offset = at * size;
			b->aio_data = (uintptr_t)b;
		}
		if (ready && syscall(SYS_io_submit, context, ready, list) != ready)
			die("io_submit");
		ready = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (ready < 1)
			die("io_getevents");
		for (int n = 0; n < ready; n++) {
			if (events[n].res != (long long)size)
				die("a transfer");
			list[n] = (struct iocb *)(uintptr_t)events[n].data;
		}
		done += ready;
		if (now() >= end)
			break;
	}
	syscall(SYS_io_destroy, context);
	double taken = now() - begun;
	munmap(buffer, depth * size);
	return done / taken;
}

static double stream(const char *device, uint64_t bytes, int writing)
{
	int fd = open(device, writing ? O_RDWR : O_RDONLY);
	size_t size = 1 << 17;
	char *buffer = aligned(size);
	double begun;
	if (fd < 0)
		die(device);
	if (ioctl(fd, BLKFLSBUF, 0))
		die("BLKFLSBUF");
	memset(buffer, 0x33, size);
	begun = now();
	for (uint64_t at = 0; at < bytes; at += size)
		if ((writing ? pwrite(fd, buffer, size, at) : pread(fd, buffer, size, at)) != (ssize_t)size)
			die("streaming");
	if (writing && fsync(fd))
		die("fsync");
	double taken = now() - begun;
	close(fd);
	return bytes / taken / (1 << 20);
}

static int bench(const char *device, uint64_t mib, double seconds)
{
	int fd = open(device, O_RDWR | O_DIRECT);
	uint64_t bytes = mib << 20;
	if (fd < 0)
		die(device);
	report("seq-write", drive(fd, bytes, 1 << 20, 4, 1, 0, seconds), "MiB/s");
	report("seq-read", drive(fd, bytes, 1 << 20, 4, 0, 0, seconds), "MiB/s");
	report("rand-read-1", drive(fd, bytes, BLOCK, 1, 0, 1, seconds), "IOPS");
	report("rand-write-1", drive(fd, bytes, BLOCK, 1, 1, 1, seconds), "IOPS");
	report("rand-read-16", drive(fd, bytes, BLOCK, 16, 0, 1, seconds), "IOPS");
	report("rand-write-16", drive(fd, bytes, BLOCK, 16, 1, 1, seconds), "IOPS");
	report("stream-write", stream(device, bytes, 1), "MiB/s");
	report("stream-read", stream(device, bytes, 0), "MiB/s");
	printf("bench done\n");
	return 0;
}

int main(int argc, char **argv)
{
	int workers = 4, zeroes = 0, option;
	uint64_t mib = 32;
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc >= 3 && !strcmp(argv[1], "check")) {
		optind = 3;
		while ((option = getopt(argc, argv, "m:w:z")) != -1) {
			if (option == 'm')
				mib = strtoull(optarg, NULL, 0);
			else if (option == 'w')
				workers = atoi(optarg);
			else if (option == 'z')
				zeroes = 1;
			else
				return 2;
		}
		check(argv[2], mib, workers, zeroes);
	}
	if (argc == 4 && !strcmp(argv[1], "stamp"))
		stamp(argv[2], strtoull(argv[3], NULL, 0));
	if (argc == 5 && !strcmp(argv[1], "verify"))
		return verify(argv[2], strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
	if (argc == 5 && !strcmp(argv[1], "bench"))
		return bench(argv[2], strtoull(argv[3], NULL, 0), atof(argv[4]));
	fprintf(stderr, "usage: diskcheck check|stamp|verify|bench DEVICE ...\n");
	return 2;
}
