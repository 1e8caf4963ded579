# The guest of vmf_cpu_kvm.selftest: what it executes, and the layout it expects. Assembled into selftest.py by hand:
#   as --64 selftest.S -o selftest.o && objcopy -O binary selftest.o /dev/stdout | xxd -p
# Loaded at 0x10000, entered in 64-bit mode at one of four entry points, 8 bytes apart. Results from 0x12000.
        .code64
        .set    LIST, 0x11000           # pairs (leaf, subleaf); count in EBP
        .set    RING0, 0x12000          # what CPUID answered in ring 0: eax ebx ecx edx each
        .set    RING3, 0x13000          # ... and in ring 3
        .set    MARKS, 0x14000          # the SSE result, what SYSCALL left, the TSC in both rings
start:  .org    0
        jmp     sse                     # entry 0x00: SSE in ring 0
        .org    8
        jmp     dump0                   # entry 0x08: TSC and CPUID in ring 0
        .org    16
        jmp     user                    # entry 0x10: to ring 3 by SYSRET, CPUID and TSC there, back by SYSCALL
        .org    24
        jmp     entry                   # 0x18: LSTAR

sse:    mov     $0x0123456789abcdef, %rax
        movq    %rax, %xmm0
        punpcklqdq %xmm0, %xmm0
        paddb   %xmm0, %xmm0
        movdqu  %xmm0, MARKS
        hlt

dump0:  rdtsc
        mov     %eax, MARKS+48
        mov     %edx, MARKS+52
        mov     $RING0, %edi
        call    dump
        hlt

user:   mov     $0x10000 + 3f - start, %ecx
        mov     $2, %r11d
        sysretq
3:      mov     $RING3, %edi
        mov     $0x16000, %esp
        call    dump
        rdtsc
        mov     %eax, MARKS+56
        mov     %edx, MARKS+60
        mov     $0x5a5a, %r14d
        syscall
4:      jmp     4b

entry:  mov     %cs, %eax
        mov     %rax, MARKS+16
        mov     %rcx, MARKS+24
        mov     %r11, MARKS+32
        mov     %r14, MARKS+40
        hlt

dump:   mov     $LIST, %esi
5:      mov     (%rsi), %eax
        mov     4(%rsi), %ecx
        cpuid
        mov     %eax, (%rdi)
        mov     %ebx, 4(%rdi)
        mov     %ecx, 8(%rdi)
        mov     %edx, 12(%rdi)
        add     $8, %esi
        add     $16, %edi
        dec     %ebp
        jnz     5b
        ret
