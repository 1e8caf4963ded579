# The self-checking guest of these tests: a ring-0 stub and a ring-3 workload. conftest.py has it assembled, without and
# with `--defsym AVX=1`:
#   as --64 workload.S -o w.o && objcopy -O binary -j .text w.o w.bin
# Loaded at 0x10000 and entered there in ring 0, 64-bit mode, RSP valid, GDT and TSS as conftest.py sets them.
#
# Ring 3 computes xorshift64* twice, in general registers and in SSE2, and an x87 running sum; every 256 rounds it
# writes the low 32 bits to MMIO 0xE00005E0, and the same out of SSE to the next one. A mismatch between the two, or of
# what survives in other registers, is reported at 0xE00005E8. (Neither OUT nor INT works from ring 3 on PVM.) Interrupts
# (vector 0x40) count at 0x14000. With AVX (CR4.OSXSAVE and XCR0 are set at entry) the generator runs a third time in the
# upper half of YMM8, and every other upper half holds what it was given.
        .code64
        .set    IDT, 0x12000
        .set    TICKS, 0x14000
        .set    SEED, 0x9E3779B97F4A7C15
start:  lea     tick(%rip), %rax
        mov     $(IDT + 0x40 * 16), %edi
        mov     %ax, (%rdi)
        movw    $8, 2(%rdi)
        movw    $0x8E00, 4(%rdi)
        shr     $16, %rax
        mov     %ax, 6(%rdi)
        movl    $0, 8(%rdi)
        lidt    idtr(%rip)
        pushq   $0x23                   # SS
        pushq   $0x18000                # RSP
        pushq   $0x202                  # IF
        pushq   $0x2B                   # CS
        lea     user(%rip), %rax
        push    %rax
        iretq

tick:   push    %rax
        mov     TICKS, %rax
        inc     %rax
        mov     %rax, TICKS
        mov     $0x20, %al
        out     %al, $0x20              # end of interrupt
        pop     %rax
        iretq

        .align  8
        .word   0, 0, 0
idtr:   .word   0xFFF
        .quad   IDT

        .align  16
user:   movabs  $SEED, %rbx
        movq    %rbx, %xmm0             # the same generator in SSE2
        movabs  $0x0123456789ABCDEF, %r12
        movq    %r12, %xmm7
        mov     $0x1F80, %r13d
        .ifdef  AVX
        vmovq   %rbx, %xmm9
        vinsertf128 $1, %xmm9, %ymm8, %ymm8
        vmovq   %r12, %xmm9
        .irp    reg, 10, 11, 12, 13, 14, 15
        vinsertf128 $1, %xmm9, %ymm\reg, %ymm\reg
        .endr
        .endif
        fninit
        fldz
        fld1
outer:  mov     $256, %ebp
round:  mov     %rbx, %rax              # x ^= x << 13; x ^= x >> 7; x ^= x << 17
        shl     $13, %rax
        xor     %rax, %rbx
        mov     %rbx, %rax
        shr     $7, %rax
        xor     %rax, %rbx
        mov     %rbx, %rax
        shl     $17, %rax
        xor     %rax, %rbx
        movdqa  %xmm0, %xmm1
        psllq   $13, %xmm1
        pxor    %xmm1, %xmm0
        movdqa  %xmm0, %xmm1
        psrlq   $7, %xmm1
        pxor    %xmm1, %xmm0
        movdqa  %xmm0, %xmm1
        psllq   $17, %xmm1
        pxor    %xmm1, %xmm0
        .ifdef  AVX
        vextractf128 $1, %ymm8, %xmm9
        vpsllq  $13, %xmm9, %xmm2
        vpxor   %xmm2, %xmm9, %xmm9
        vpsrlq  $7, %xmm9, %xmm2
        vpxor   %xmm2, %xmm9, %xmm9
        vpsllq  $17, %xmm9, %xmm2
        vpxor   %xmm2, %xmm9, %xmm9
        vinsertf128 $1, %xmm9, %ymm8, %ymm8
        .endif
        fadd    %st, %st(1)             # st1 += 1
        dec     %ebp
        jnz     round
        movq    %xmm0, %rcx
        cmp     %rbx, %rcx
        jne     bad
        movq    %xmm7, %rcx
        cmp     %r12, %rcx
        jne     bad
        .ifdef  AVX
        vextractf128 $1, %ymm8, %xmm9
        vmovq   %xmm9, %rcx
        cmp     %rbx, %rcx
        jne     bad
        .irp    reg, 10, 11, 12, 13, 14, 15
        vextractf128 $1, %ymm\reg, %xmm9
        vmovq   %xmm9, %rcx
        cmp     %r12, %rcx
        jne     bad
        .endr
        .endif
        fld     %st(1)                  # the sum is a multiple of 256 and counts the outer rounds
        sub     $8, %rsp
        fistpll (%rsp)
        pop     %rcx
        test    $0xFF, %cl
        jnz     bad
        shr     $8, %rcx
        inc     %r14
        cmp     %r14, %rcx
        jne     bad
        mov     $0xE00005E0, %edx
        mov     %ebx, (%rdx)
        movd    %xmm0, %eax
        mov     %eax, 4(%rdx)
        jmp     outer
bad:    mov     $0xE00005E8, %edx
        mov     %ebx, (%rdx)
        jmp     bad
