/* Loops of fixed work for benchmarks/bench_compute.py, which times them from outside by the lines printed here:
 * "begin NAME" and "end NAME RESULT". The results must be the same on every engine. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t seed = 0x9E3779B97F4A7C15u;

static uint64_t next(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static uint64_t integer(void)
{
    for (int i = 0; i < 200000000; i++)
        next();
    return seed;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint64_t sort(void)
{
    enum { N = 1000000 };
    uint32_t *all = malloc(N * sizeof *all);
    uint64_t sum = 0;
    for (int i = 0; i < N; i++)
        all[i] = (uint32_t)next();
    qsort(all, N, sizeof *all, compare);
    for (int i = 0; i < N; i += 1000)
        sum = sum * 31 + all[i];
    free(all);
    return sum;
}

static uint64_t copy(void)
{
    enum { SIZE = 4 << 20 };
    uint64_t *from = malloc(SIZE), *to = malloc(SIZE), sum = 0;
    for (size_t i = 0; i < SIZE / 8; i++)
        from[i] = next();
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < SIZE / 8; i++)
            to[i] = from[i] + (uint64_t)round;
        sum += to[next() % (SIZE / 8)];
    }
    free(from);
    free(to);
    return sum;
}

static uint64_t chase(void)
{
    enum { N = 1 << 19 };
    uint32_t *follow = malloc(N * sizeof *follow), at = 0;
    for (uint32_t i = 0; i < N; i++)
        follow[i] = i;
    for (uint32_t i = N - 1; i > 0; i--) { /* one cycle through all: Sattolo */
        uint32_t other = (uint32_t)(next() % i), kept = follow[i];
        follow[i] = follow[other];
        follow[other] = kept;
    }
    for (int i = 0; i < 30000000; i++)
        at = follow[at];
    free(follow);
    return at;
}

static uint64_t matrix(void)
{
    enum { N = 128 };
    static double a[N][N], b[N][N], c[N][N];
    uint64_t bits;
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++)
            a[i][k] = (double)(next() % 1000), b[i][k] = (double)(next() % 1000);
    for (int round = 0; round < 12; round++)
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++)
                for (int j = 0; j < N; j++)
                    c[i][j] += a[i][k] * b[k][j];
    memcpy(&bits, &c[N / 2][N / 3], sizeof bits);
    return bits;
}

static uint64_t calls(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 1000000; i++)
        sum += (uint64_t)syscall(SYS_getppid) != 0;
    return sum;
}

static uint64_t faults(void)
{
    uint64_t sum = 0;
    for (int round = 0; round < 10; round++) {
        enum { SIZE = 16 << 20 };
        unsigned char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(memory, SIZE, MADV_NOHUGEPAGE);
        for (size_t at = 0; at < SIZE; at += 4096)
            memory[at] = 1, sum++;
        munmap(memory, SIZE);
    }
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*work)(void);
} loops[] = {{"integer", integer}, {"sort", sort},       {"copy", copy},    {"chase", chase},
             {"matrix", matrix},   {"syscalls", calls}, {"faults", faults}};

int main(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++) {
        printf("begin %s\n", loops[i].name);
        printf("end %s %016llx\n", loops[i].name, (unsigned long long)loops[i].work());
    }
    printf("all done\n");
    for (;;)
        pause();
}
