/* A 32-bit Linux program without a C library (gcc -m32 -nostdlib): every way from 32-bit code into the kernel.
 *
 * The vDSO's __kernel_vsyscall (its address is in the auxiliary vector) uses SYSENTER on Intel's processors, SYSCALL on
 * AMD's, and INT 0x80 on others. Each round calls the kernel through it and through INT 0x80, with all six arguments,
 * compares the answers, and looks whether the registers that a call must keep are kept. It prints "entry32 N", and
 * "entry32 WRONG what" when something differs.
 *
 * Arguments: rounds, milliseconds between two, and how many calls through the vDSO two threads make at the same time
 * before the first round ("entry32 threads done"): so many that interrupts hit every instruction of the way.
 */
typedef unsigned int u32;

enum { NR_exit = 1, NR_write = 4, NR_getpid = 20, NR_mmap2 = 192, NR_nanosleep = 162, NR_munmap = 91, NR_gettid = 224 };
enum { AT_NULL = 0, AT_SYSINFO = 32 };

static u32 vsyscall;

/* Number and arguments in the registers of the ABI, and what came back in all seven. */
struct regs {
    u32 eax, ebx, ecx, edx, esi, edi, ebp;
};

/* A thread that runs the function whose address is the first word on its stack; negative when there is none. */
int spawn(u32 flags, u32 *stack);
/* entry(regs, target): the call through `target`, or INT 0x80 when it is 0. */
void entry(struct regs *regs, u32 target);
__asm__(".text\n"
        "entry:\n"
        "  pushl %ebp; pushl %ebx; pushl %esi; pushl %edi\n"
        "  movl 20(%esp), %ebp\n"
        "  movl 24(%esp), %eax\n"
        "  pushl %ebp\n"
        "  pushl %eax\n"
        "  movl 0(%ebp), %eax; movl 4(%ebp), %ebx; movl 8(%ebp), %ecx; movl 12(%ebp), %edx\n"
        "  movl 16(%ebp), %esi; movl 20(%ebp), %edi; movl 24(%ebp), %ebp\n"
        "  cmpl $0, (%esp)\n"
        "  je 1f\n"
        "  call *(%esp)\n"
        "  jmp 2f\n"
        "1: int $0x80\n"
        "2: movl %ebp, (%esp)\n"
        "  movl 4(%esp), %ebp\n"
        "  movl %eax, 0(%ebp); movl %ebx, 4(%ebp); movl %ecx, 8(%ebp); movl %edx, 12(%ebp)\n"
        "  movl %esi, 16(%ebp); movl %edi, 20(%ebp); popl %eax; movl %eax, 24(%ebp)\n"
        "  popl %eax\n"
        "  popl %edi; popl %esi; popl %ebx; popl %ebp\n"
        "  ret\n"
        "spawn:\n"
        "  pushl %ebx\n"
        "  movl 8(%esp), %ebx; movl 12(%esp), %ecx\n"
        "  movl $120, %eax\n" /* clone */
        "  int $0x80\n"
        "  testl %eax, %eax\n"
        "  jz 1f\n"
        "  popl %ebx\n"
        "  ret\n"
        "1: popl %eax\n"
        "  call *%eax\n"
        ".globl _start\n"
        "_start:\n"
        "  movl %esp, %eax\n"
        "  andl $-16, %esp\n"
        "  subl $12, %esp\n"
        "  pushl %eax\n"
        "  call begin\n");

static u32 call6(u32 way, u32 number, u32 a, u32 b, u32 c, u32 d, u32 e, u32 f)
{
    struct regs regs = {number, a, b, c, d, e, f};
    entry(&regs, way);
    return regs.eax;
}

static void print(const char *text)
{
    u32 size = 0;
    while (text[size])
        size++;
    call6(0, NR_write, 1, (u32)text, size, 0, 0, 0);
}

static void wrong(const char *what)
{
    print("entry32 WRONG ");
    print(what);
    print("\n");
}

static void print_round(u32 number)
{
    char text[32] = "entry32 ", digits[12];
    u32 size = 8, count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    while (count)
        text[size++] = digits[--count];
    text[size++] = '\n';
    text[size] = 0;
    /* Through the vDSO, so that a line also says that it works. */
    if (call6(vsyscall, NR_write, 1, (u32)text, size, 0, 0, 0) != size)
        wrong("write");
}

static void round_of(u32 way, u32 pid)
{
    struct regs before = {NR_getpid, 0x11111111, 0x22222222, 0x33333333, 0x44444444, 0x55555555, 0x66666666};
    struct regs after = before;
    entry(&after, way);
    if (after.eax != pid)
        wrong("getpid");
    if (after.ebx != before.ebx || after.ecx != before.ecx || after.edx != before.edx || after.esi != before.esi ||
        after.edi != before.edi || after.ebp != before.ebp)
        wrong("registers");
    /* Six arguments: the last, an offset that is no page's number for an anonymous mapping, must be ignored or arrive. */
    u32 page = call6(way, NR_mmap2, 0, 4096, 3 /* read, write */, 0x22 /* private, anonymous */, (u32)-1, 0);
    if (page > 0xfffff000u) {
        wrong("mmap2");
        return;
    }
    volatile u32 *words = (u32 *)page;
    for (u32 n = 0; n < 1024; n++) {
        if (words[n])
            wrong("fresh memory");
        words[n] = n * 0x01000193u;
    }
    if (words[1023] != 1023 * 0x01000193u)
        wrong("memory");
    if (call6(way, NR_munmap, page, 4096, 0, 0, 0, 0))
        wrong("munmap");
    if (call6(way, 9999, 0, 0, 0, 0, 0, 0) != (u32)-38)
        wrong("no such call");
}

static u32 calls_of_thread, own_pid;
static volatile u32 threads_at_work;

static void thread(void)
{
    struct regs before = {NR_getpid, 0x11111111, 0x22222222, 0x33333333, 0x44444444, 0x55555555, 0x66666666};
    for (u32 n = 0; n < calls_of_thread; n++) {
        struct regs after = before;
        entry(&after, vsyscall);
        if (after.eax != own_pid || after.ebx != before.ebx || after.ecx != before.ecx || after.edx != before.edx ||
            after.esi != before.esi || after.edi != before.edi || after.ebp != before.ebp) {
            wrong("registers of a thread");
            break;
        }
    }
    __sync_fetch_and_sub(&threads_at_work, 1);
    call6(0, NR_exit, 0, 0, 0, 0, 0, 0);
}

static void run_threads(u32 calls)
{
    enum { SIZE = 16384, THREADS = 2, FLAGS = 0x50f00 /* VM, FS, FILES, SIGHAND, THREAD, SYSVSEM */ };
    calls_of_thread = calls;
    threads_at_work = THREADS;
    for (u32 n = 0; n < THREADS; n++) {
        u32 memory = call6(0, NR_mmap2, 0, SIZE, 3, 0x22, (u32)-1, 0);
        u32 *stack = (u32 *)(memory + SIZE - 20);
        if (memory > 0xfffff000u) {
            wrong("mmap2 of a thread");
            return;
        }
        *stack = (u32)thread;
        if (spawn(FLAGS, stack) < 0) {
            wrong("clone");
            return;
        }
    }
    while (threads_at_work) {
        u32 time[2] = {0, 20000000};
        if (call6(vsyscall, NR_nanosleep, (u32)time, 0, 0, 0, 0, 0))
            wrong("nanosleep beside threads");
    }
    print("entry32 threads done\n");
}

static u32 number_of(const char *text)
{
    u32 value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (u32)(*text++ - '0');
    return value;
}

__attribute__((used)) static void begin(u32 *stack)
{
    u32 count = stack[0];
    u32 rounds = count > 1 ? number_of((char *)stack[2]) : 1, pause = count > 2 ? number_of((char *)stack[3]) : 0;
    u32 *vector = stack + 1 + count + 1;
    while (*vector++) /* the environment */
        ;
    for (; vector[0] != AT_NULL; vector += 2)
        if (vector[0] == AT_SYSINFO)
            vsyscall = vector[1];
    if (!vsyscall)
        wrong("no vDSO");
    u32 pid = own_pid = call6(0, NR_getpid, 0, 0, 0, 0, 0, 0);
    if (vsyscall && count > 3)
        run_threads(number_of((char *)stack[4]));
    for (u32 n = 1; vsyscall && n <= rounds; n++) {
        round_of(vsyscall, pid);
        round_of(0, pid);
        print_round(n);
        u32 time[2] = {pause / 1000, pause % 1000 * 1000000};
        if (pause && call6(vsyscall, NR_nanosleep, (u32)time, 0, 0, 0, 0, 0))
            wrong("nanosleep");
    }
    print("entry32 done\n");
    call6(0, NR_exit, 0, 0, 0, 0, 0, 0);
    for (;;)
        ;
}
