/* Runs pieces of code on the host's processor, as test_unicorn_floats.py asks it to: records come on stdin and go back
 * on stdout, changed by the code in them. Exceptions that the code does not mask end it, and are noted. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
    uint8_t before[512], after[512];
    uint64_t registers[6];
    uint8_t memory[32];
    uint64_t fault; /* comes as where to go on after one, as an offset in the code; goes as the signal */
    uint64_t size;
    uint8_t code[240];
} __attribute__((aligned(16))) Record;

static Record record;
static uint8_t *code;
static volatile uint64_t resume, caught;

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)info;
    caught = (uint64_t)number;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)(code + resume);
}

static int whole(int (*call)(char *, size_t), char *at, size_t size)
{
    for (size_t done = 0; done < size;) {
        int n = call(at + done, size - done);
        if (n <= 0)
            return 0;
        done += (size_t)n;
    }
    return 1;
}

static int get(char *at, size_t size)
{
    return (int)read(0, at, size);
}

static int give(char *at, size_t size)
{
    return (int)write(1, at, size);
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
    sigaction(SIGFPE, &action, NULL);
    sigaction(SIGILL, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (code == MAP_FAILED)
        return 1;
    while (whole(get, (char *)&record, sizeof record)) {
        if (record.size > sizeof record.code)
            return 2;
        memcpy(code, record.code, record.size);
        code[record.size] = 0xc3;
        resume = record.fault;
        caught = 0;
        uint32_t usual = 0x1f80;
        Record *address = &record;
        __asm__ volatile("push %%rbx\n\tcall *%1\n\tpop %%rbx\n\tfninit\n\tldmxcsr %2"
                         : "+D"(address)
                         : "S"(code), "m"(usual)
                         : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3",
                           "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
                           "xmm15");
        record.fault = caught;
        if (!whole(give, (char *)&record, sizeof record))
            return 3;
    }
    return 0;
}
