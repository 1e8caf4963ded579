# The built-in bare-metal guest: a program without an operating system that checks itself and shows that it lives.
#
# Entry contract: vmf.machine.boot.bare (flat image at 1 MiB, 64-bit mode, RSI = end of low RAM). It programs the 8259
# pair, the 8254 (100 Hz) and the 16550 with interrupts, then for ever:
#   - 64 pages of its 8 MiB at each timer interrupt: compare what the last walk left, write the next generation (SSE2);
#   - compare results of SSE and x87 arithmetic with those of the first time;
#   - print "tick N CHECKSUM" four times a second, and a status line once a second (see vmf.testing.serial_check);
#   - echo a typed line as "echo: LINE";
#   - halt until the next interrupt.
# Build: build.py in this folder; the result, demo.bin, is in the tree. With INTEGER_ONLY defined it does without SSE
# and x87, for KVMs that emulate ring 0 (and slowly: it walks fewer pages then).

        .intel_syntax noprefix
        .code64

        .set IDT,        0x110000       # 256 gates of 16 bytes
        .set VARS,       0x112000
        .set TICKS,      VARS + 0       # timer interrupts so far
        .set SHOWN,      VARS + 8       # TICKS at the last line
        .set NUMBER,     VARS + 16      # of the last line
        .set ERRORS,     VARS + 24
        .set RX_HEAD,    VARS + 32      # bytes received
        .set RX_TAIL,    VARS + 40      # bytes looked at
        .set LINE_SIZE,  VARS + 48
        .set SSE_RESULT, VARS + 64      # of the first computation
        .set X87_RESULT, VARS + 80
        .set SCRATCH,    VARS + 96
        .set CHECKED,    VARS + 112     # the results above are there
        .set RX,         VARS + 0x100   # ring of 256 bytes
        .set LINE,       VARS + 0x200   # the line being typed, 128 bytes
        .set FIRST_PAGE, 0x140000 >> 12 # of the memory that is walked
        .ifdef INTEGER_ONLY
        .set MOST_PAGES, 32
        .set AT_ONCE,    2
        .else
        .set MOST_PAGES, 2048
        .set AT_ONCE,    64             # pages between two looks at the clock
        .endif
        .set COM1,       0x3F8
        .set CODE,       0x10
        .set HZ,         100
        .set GOLD,       0x9E3779B97F4A7C15

        # rbx page, r12 generation, r13 finished walks, r14d checksum, r15 end page, rbp counter
        .globl _start
_start: cli
        cld
        mov r15, rsi
        shr r15, 12
        mov eax, FIRST_PAGE + MOST_PAGES
        cmp r15, rax
        cmova r15, rax
        mov ebx, FIRST_PAGE
        xor r12d, r12d
        xor r13d, r13d
        xor r14d, r14d

        # interrupt descriptor table
        xor esi, esi
gates:  lea rax, [rip + irq_other]
        cmp esi, 32
        jae 1f
        mov eax, esi
        shl eax, 4
        lea rdx, [rip + exceptions]
        add rax, rdx
1:      cmp esi, 0x20
        jne 2f
        lea rax, [rip + irq_timer]
2:      cmp esi, 0x24
        jne 3f
        lea rax, [rip + irq_uart]
3:      mov edi, esi
        shl edi, 4
        add edi, IDT
        mov word ptr [rdi], ax
        mov dword ptr [rdi + 2], CODE
        mov byte ptr [rdi + 5], 0x8E
        shr rax, 16
        mov word ptr [rdi + 6], ax
        mov qword ptr [rdi + 8], 0
        inc esi
        cmp esi, 256
        jb gates
        lidt [rip + idtr]

        # 8259 pair: vectors 0x20 and 0x28, only timer and UART let through
        lea rsi, [rip + setup]
        mov ecx, (setup_end - setup) / 3
port:   movzx edx, word ptr [rsi]
        mov al, [rsi + 2]
        out dx, al
        add rsi, 3
        dec ecx
        jnz port
        mov edx, COM1
        in al, dx
        lea rsi, [rip + banner]
        call puts
        sti

forever:
        mov ebp, AT_ONCE
slice:  call walk_page
        dec ebp
        jnz slice
        call arithmetic
        call typed
        call tick
        hlt
        jmp forever

# Check and renew one page: qword i of page p holds p * GOLD + generation * 2^32 + i.
walk_page:
        mov rdi, rbx
        shl rdi, 12
        mov rax, GOLD
        imul rax, rbx
        mov rdx, r12
        shl rdx, 32
        add rdx, rax                    # now
        mov rax, 1
        shl rax, 32
        mov rcx, rdx
        sub rcx, rax                    # last time
        .ifdef INTEGER_ONLY
        mov r8, rcx
        xor r9d, r9d
        mov ecx, 512
1:      mov rax, [rdi]
        xor rax, r8
        or r9, rax
        mov [rdi], rdx
        inc r8
        inc rdx
        add rdi, 8
        dec ecx
        jnz 1b
        test r12, r12
        jz 2f
        test r9, r9
        jz 2f
        .else
        movq xmm0, rcx
        inc rcx
        movq xmm5, rcx
        punpcklqdq xmm0, xmm5
        movq xmm1, rdx
        inc rdx
        movq xmm5, rdx
        punpcklqdq xmm1, xmm5
        mov eax, 2
        movq xmm2, rax
        punpcklqdq xmm2, xmm2
        pxor xmm3, xmm3
        mov ecx, 256
1:      movdqa xmm4, [rdi]
        pxor xmm4, xmm0
        por xmm3, xmm4
        movdqa [rdi], xmm1
        paddq xmm0, xmm2
        paddq xmm1, xmm2
        add rdi, 16
        dec ecx
        jnz 1b
        test r12, r12
        jz 2f
        movq rax, xmm3
        psrldq xmm3, 8
        movq rdx, xmm3
        or rax, rdx
        jz 2f
        .endif
        lea rsi, [rip + bad_memory]
        call complain
        mov rax, rbx
        call decimal
        call newline
2:      inc rbx
        cmp rbx, r15
        jb 3f
        mov ebx, FIRST_PAGE
        inc r12
        inc r13
3:      ret

# The same sum every time: bit for bit what it was the first time?
arithmetic:
        .ifdef INTEGER_ONLY
        ret
        .endif
        movsd xmm0, [rip + one_quarter]
        movsd xmm1, [rip + factor]
        mov ecx, 1
1:      mulsd xmm0, xmm1
        cvtsi2sd xmm2, ecx
        movsd xmm3, [rip + three]
        divsd xmm3, xmm2
        addsd xmm0, xmm3
        sqrtsd xmm4, xmm0
        unpcklpd xmm4, xmm3
        inc ecx
        cmp ecx, 500
        jb 1b
        addsd xmm4, xmm0
        fld1
        mov ecx, 300
2:      fldpi
        fmulp
        fld1
        faddp
        fsqrt
        dec ecx
        jnz 2b
        fstp tbyte ptr [SCRATCH]
        cmp qword ptr [CHECKED], 0
        jne 3f
        movupd [SSE_RESULT], xmm4
        mov rax, [SCRATCH]
        mov [X87_RESULT], rax
        mov ax, [SCRATCH + 8]
        mov [X87_RESULT + 8], ax
        inc qword ptr [CHECKED]
        ret
3:      movupd xmm5, [SSE_RESULT]
        pxor xmm5, xmm4
        movq rax, xmm5
        psrldq xmm5, 8
        movq rdx, xmm5
        or rax, rdx
        jz 4f
        lea rsi, [rip + bad_sse]
        call complain
        call newline
4:      mov rax, [SCRATCH]
        cmp rax, [X87_RESULT]
        jne 5f
        mov ax, [SCRATCH + 8]
        cmp ax, [X87_RESULT + 8]
        je 6f
5:      lea rsi, [rip + bad_x87]
        call complain
        call newline
6:      ret

# "tick N CHECKSUM" every quarter of a second; a status line with every fourth.
tick:   mov rax, [TICKS]
        sub rax, [SHOWN]
        cmp rax, HZ / 4
        jb 9f
        add qword ptr [SHOWN], HZ / 4
        inc qword ptr [NUMBER]
        imul r14d, r14d, 1664525
        add r14d, 1013904223
        add r14d, [NUMBER]
        lea rsi, [rip + text_tick]
        call puts
        mov rax, [NUMBER]
        call decimal
        mov al, ' '
        call putc
        mov ecx, 8
1:      rol r14d, 4
        mov eax, r14d
        and eax, 15
        lea rsi, [rip + digits]
        mov al, [rsi + rax]
        call putc
        dec ecx
        jnz 1b
        call newline
        test byte ptr [NUMBER], 3
        jnz 9f
        lea rsi, [rip + text_ok]
        cmp qword ptr [ERRORS], 0
        je 2f
        lea rsi, [rip + text_failed]
2:      call puts
        mov rax, r13
        call decimal
        lea rsi, [rip + text_least]
        call puts
        mov rax, r13
        call decimal
        lea rsi, [rip + text_errors]
        call puts
        mov rax, [ERRORS]
        call decimal
        call newline
9:      ret

# Take what was typed; at the end of a line give it back.
typed:  mov rcx, [RX_TAIL]
        cmp rcx, [RX_HEAD]
        je 9f
        movzx ecx, cl
        mov al, [RX + rcx]
        inc qword ptr [RX_TAIL]
        cmp al, 13
        je 1f
        cmp al, 10
        je 1f
        mov rcx, [LINE_SIZE]
        cmp ecx, 127
        jae typed
        mov [LINE + rcx], al
        inc qword ptr [LINE_SIZE]
        jmp typed
1:      mov rcx, [LINE_SIZE]
        mov byte ptr [LINE + rcx], 0
        mov qword ptr [LINE_SIZE], 0
        lea rsi, [rip + text_echo]
        call puts
        mov esi, LINE
        call puts
        call newline
        jmp typed
9:      ret

complain:
        inc qword ptr [ERRORS]
# Print the zero-terminated string at rsi. Clobbers rax, rsi.
puts:   lodsb
        test al, al
        jz 1f
        call putc
        jmp puts
1:      ret

newline:
        mov al, 13
        call putc
        mov al, 10
# Print al. Clobbers nothing.
putc:   push rdx
        push rax
        mov edx, COM1 + 5
1:      in al, dx
        test al, 0x20
        jz 1b
        mov edx, COM1
        mov al, [rsp]
        out dx, al
        pop rax
        pop rdx
        ret

# Print rax as a decimal number. Clobbers rax, rcx, rdx, rdi.
decimal:
        mov edi, 10
        xor ecx, ecx
1:      xor edx, edx
        div rdi
        push rdx
        inc ecx
        test rax, rax
        jnz 1b
2:      pop rax
        add al, '0'
        call putc
        dec ecx
        jnz 2b
        ret

irq_timer:
        push rax
        inc qword ptr [TICKS]
        mov al, 0x20
        out 0x20, al
        pop rax
        iretq

irq_uart:
        push rax
        push rcx
        push rdx
1:      mov edx, COM1 + 5
        in al, dx
        test al, 1
        jz 2f
        mov edx, COM1
        in al, dx
        mov rcx, [RX_HEAD]
        movzx ecx, cl
        mov [RX + rcx], al
        inc qword ptr [RX_HEAD]
        jmp 1b
2:      mov al, 0x20
        out 0x20, al
        pop rdx
        pop rcx
        pop rax
irq_other:
        iretq

# An exception is the end: name it and stop.
exception:
        lea rsi, [rip + bad_exception]
        call complain
        pop rax
        call decimal
        call newline
1:      cli
        hlt
        jmp 1b

        .balign 16
exceptions:
        .set vector, 0
        .rept 32
        push vector
        jmp exception
        .balign 16
        .set vector, vector + 1
        .endr

        .balign 8
one_quarter: .double 1.25
factor: .double 1.0000003
three:  .double 3.0
idtr:   .word 0xFFF
        .quad IDT

        .macro outb port, value
        .word \port
        .byte \value
        .endm
setup:  outb 0x20, 0x11
        outb 0xA0, 0x11
        outb 0x21, 0x20
        outb 0xA1, 0x28
        outb 0x21, 0x04
        outb 0xA1, 0x02
        outb 0x21, 0x01
        outb 0xA1, 0x01
        outb 0x21, 0xEE
        outb 0xA1, 0xFF
        # 8254 channel 0, rate generator: 1193182 Hz / 11932
        outb 0x43, 0x34
        outb 0x40, 11932 & 0xFF
        outb 0x40, 11932 >> 8
        # 16550: 115200 baud, 8N1, FIFO on and empty, DTR RTS OUT2, interrupt on received data
        outb COM1 + 3, 0x80
        outb COM1 + 0, 0x01
        outb COM1 + 1, 0x00
        outb COM1 + 3, 0x03
        outb COM1 + 2, 0xC7
        outb COM1 + 4, 0x0B
        outb COM1 + 1, 0x01
setup_end:

digits: .ascii "0123456789abcdef"
banner: .asciz "vmf: the built-in guest is running; type a line\r\n"
text_tick: .asciz "tick "
text_ok: .asciz "selfcheck: ok rounds="
text_failed: .asciz "selfcheck: FAILED rounds="
text_least: .asciz " least="
text_errors: .asciz " errors="
text_echo: .asciz "echo: "
bad_memory: .asciz "MISMATCH memory page "
bad_sse: .asciz "MISMATCH sse"
bad_x87: .asciz "MISMATCH x87"
bad_exception: .asciz "MISMATCH exception "
