//! The programs' text. Position independent, one page, no stack, no interrupts, no kernel: registers and memory only.
//!
//! Registers on entry: `rdi` holds the address of this vCPU's parameters ([`super::Parameter`]), all others zero.
//! Through the whole run `rdi` stays and `rbx` is the packet port's window (`device.rs` has its registers).

use super::rules;

/// Byte offset in [`text`] where a ledger or metronome starts.
pub const LEDGER_ENTRY: u64 = 0;

/// Byte offset in [`text`] where a scanner starts.
pub const SCANNER_ENTRY: u64 = 2048;

std::arch::global_asm!(
    r#"
    .pushsection .rodata.belay_guest_text, "a", @progbits
    .balign 16
    .globl belay_guest_text
    .globl belay_guest_text_end

    .macro belay_mix
        mov rcx, rax
        shr rcx, 30
        xor rax, rcx
        movabs rcx, 0xbf58476d1ce4e5b9
        imul rax, rcx
        mov rcx, rax
        shr rcx, 27
        xor rax, rcx
        movabs rcx, 0x94d049bb133111eb
        imul rax, rcx
        mov rcx, rax
        shr rcx, 31
        xor rax, rcx
    .endm

    /* r13 = fold(r13, \word) */
    .macro belay_fold word
        rol r13, 5
        xor r13, \word
        movabs rcx, 0xbf58476d1ce4e5b9
        imul r13, rcx
    .endm

    /* rax = base of the fill of page \page; carry set when the page is filled */
    .macro belay_fill_base page
        mov rax, \page
        movabs rcx, {GOLDEN}
        imul rax, rcx
        add rax, [rdi + 8*2]
        belay_mix
        movzx ecx, al
        cmp rcx, [rdi + 8*3]
    .endm

    /* fills the pages of the range in parameters \first, \first + 1 */
    .macro belay_fill first
        mov r12, [rdi + 8*\first]
        mov r13, [rdi + 8*\first + 8]
    .Lpage\@:
        test r13, r13
        jz .Ldone\@
        belay_fill_base r12
        jae .Lhole\@
        mov rdx, r12
        shl rdx, 12
        mov ecx, 512
        movabs rsi, {GOLDEN}
    .Lword\@:
        mov [rdx], rax
        add rax, rsi
        add rdx, 8
        dec ecx
        jnz .Lword\@
    .Lhole\@:
        inc r12
        dec r13
        jmp .Lpage\@
    .Ldone\@:
    .endm

    /* the port's words 0, 1, 2 and 4; the caller stores word 3 and rings */
    .macro belay_packet_words kind
        mov rax, [rdi + 8*14]
        shl rax, 8
        or rax, \kind
        mov [rbx], rax
        mov [rbx + 8], r12
        mov [rbx + 16], r13
        mov [rbx + 32], r14
    .endm

    .macro belay_ledger_packet kind
        belay_packet_words \kind
        mov rax, [rdi + 8*10]
        mov rax, [rax]
        mov [rbx + 24], rax
        mov qword ptr [rbx + {DOORBELL}], 5
    .endm

    /* --- ledger and metronome ---
       r8 step seed, r9 address and r10 pages of the own part of the working set, r11 last hash,
       r12 step, r13 digest, r14 last nonce, r15 steps left in the batch, rbp batches left to the packet */
belay_guest_text:
    mov rbx, [rdi]
    cmp qword ptr [rdi + 8*13], 0
    je .Lfilled
    belay_fill 4
    belay_fill 6
.Lfilled:
    mov r8, [rdi + 8*1]
    mov r9, [rdi + 8*4]
    shl r9, 12
    mov r10, [rdi + 8*5]
    xor r12, r12
    xor r13, r13
    xor r14, r14
    mov rbp, [rdi + 8*9]
    belay_ledger_packet {FILLED}
.Lbatch:
    mov r15, [rdi + 8*8]
.Lstep:
    mov rax, r12
    movabs rcx, {GOLDEN}
    imul rax, rcx
    add rax, r8
    belay_mix
    mov r11, rax
    /* the page into rdx, by the pattern; of the phases, by what it is now */
    mov rcx, [rdi + 8*18]
    cmp ecx, {PHASES}
    jne .Lpattern
    mov rcx, r12
    shr rcx, {PHASE_SHIFT}
    and ecx, 3
    cmp ecx, 3
    je .Lrandom
.Lpattern:
    cmp ecx, {SEQUENTIAL}
    jb .Lrandom
    je .Lsequential
    .rept 3
    mul rax
    mov rax, rdx
    .endr
.Lrandom:
    mul r10
    jmp .Lplaced
.Lsequential:
    mov rax, r12
    xor edx, edx
    div r10
.Lplaced:
    shl rdx, 12
    add rdx, r9
    mov eax, r11d
    and eax, 511
    lea rdx, [rdx + rax*8]
    mov rax, [rdx]
    belay_fold rax
    add rax, r11
    belay_mix
    mov [rdx], rax
    inc r12
    dec r15
    jnz .Lstep

    /* counters all vCPUs share: additions commute, so their sum is known whatever the order */
    mov rdx, [rdi + 8*12]
    test rdx, rdx
    jz .Lalone
    mov eax, r11d
    and eax, 63
    lock add [rdx + rax*8], r11
    mov rax, [rdi + 8*8]
    lock xadd [rdx + 512], rax
.Lalone:

    /* the metronome watches its clock: [log] gaps seen, [log + 8] largest, [log + 128 + 16 n] when and how long */
    mov rsi, [rdi + 8*15]
    test rsi, rsi
    jz .Lpace
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r15, rax
    add r15, [rdi + 8*16]
    mov r11, rax
.Ltick:
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rcx, rax
    sub rcx, r11
    mov r11, rax
    cmp rcx, [rdi + 8*17]
    jb .Lsmooth
    cmp rcx, [rsi + 8]
    jbe .Lnot_largest
    mov [rsi + 8], rcx
.Lnot_largest:
    mov rdx, [rsi]
    inc qword ptr [rsi]
    and edx, {METRONOME_MASK}
    shl edx, 4
    mov [rsi + rdx + 128], rax
    mov [rsi + rdx + 136], rcx
.Lsmooth:
    cmp rax, r15
    jb .Ltick

.Lpace:
    mov rax, [rbx + {PACE}]
    cmp rax, r14
    je .Lsame_nonce
    mov r14, rax
    mov rdx, [rdi + 8*10]
    mov rsi, [rdx]
    cmp rsi, [rdi + 8*11]
    jae .Lsame_nonce
    belay_fold rax
    inc qword ptr [rdx]
    shl rsi, 4
    mov [rdx + rsi + 16], r12
    mov [rdx + rsi + 24], rax
.Lsame_nonce:
    dec rbp
    jnz .Lbatch
    mov rbp, [rdi + 8*9]
    belay_ledger_packet {PROGRESS}
    jmp .Lbatch

    /* --- scanner ---
       r8 page, r9 pages left in the range, r10 which range, r11 nonces seen, r12 pages scanned, r13 digest of the pass,
       r14 last nonce, r15 pages left in the batch, rsp not a stack */
    .org belay_guest_text + {SCANNER_ENTRY}
    mov rbx, [rdi]
    cmp qword ptr [rdi + 8*13], 0
    je .Lscan
    belay_fill 4
    belay_fill 6
.Lscan:
    xor r11, r11
    xor r12, r12
    xor r13, r13
    xor r14, r14
    mov r15, [rdi + 8*8]
    belay_packet_words {FILLED}
    mov [rbx + 24], r11
    mov qword ptr [rbx + {DOORBELL}], 5
.Lpass:
    xor r13, r13
    xor r10, r10
.Lrange:
    lea rdx, [rdi + 8*4]
    mov r8, [rdx + r10*8]
    mov r9, [rdx + r10*8 + 8]
.Lscan_page:
    test r9, r9
    jz .Lrange_end
    xor esi, esi
    belay_fill_base r8
    mov eax, 0
    jae .Lexpect_hole
    belay_fill_base r8
    movabs rsi, {GOLDEN}
.Lexpect_hole:
    mov rdx, r8
    shl rdx, 12
    mov rsp, 512
.Lscan_word:
    mov rcx, [rdx]
    cmp rcx, rax
    jne .Lmismatch
    belay_fold rax
    add rax, rsi
    add rdx, 8
    dec rsp
    jnz .Lscan_word
.Lscanned:
    inc r8
    dec r9
    inc r12
    dec r15
    jnz .Lscan_page
    mov r15, [rdi + 8*8]
    mov rax, [rbx + {PACE}]
    cmp rax, r14
    je .Lscan_page
    mov r14, rax
    inc r11
    jmp .Lscan_page
.Lmismatch:
    mov [rbx + 16], rcx
    mov [rbx + 24], rax
    mov [rbx + 8], rdx
    mov rax, [rdi + 8*14]
    shl rax, 8
    or rax, {MISMATCH}
    mov [rbx], rax
    mov qword ptr [rbx + {DOORBELL}], 4
    jmp .Lscanned
.Lrange_end:
    add r10, 2
    cmp r10, 4
    jb .Lrange
    belay_packet_words {PASS}
    mov [rbx + 24], r11
    mov qword ptr [rbx + {DOORBELL}], 5
    jmp .Lpass
belay_guest_text_end:
    .popsection
    "#,
    GOLDEN = const rules::GOLDEN as i64,
    SCANNER_ENTRY = const SCANNER_ENTRY,
    DOORBELL = const crate::kvm::device::DOORBELL,
    PACE = const crate::kvm::device::PACE,
    METRONOME_MASK = const super::METRONOME_LOG_ENTRIES - 1,
    SEQUENTIAL = const rules::Pattern::Sequential as u8,
    PHASES = const rules::Pattern::Phases as u8,
    PHASE_SHIFT = const rules::PHASE_SHIFT,
    FILLED = const rules::kind::FILLED,
    PROGRESS = const rules::kind::PROGRESS,
    PASS = const rules::kind::PASS,
    MISMATCH = const rules::kind::MISMATCH,
);

unsafe extern "C" {
    static belay_guest_text: u8;
    static belay_guest_text_end: u8;
}

/// The bytes to be copied into guest memory.
pub fn text() -> &'static [u8] {
    let (start, end) = (&raw const belay_guest_text, &raw const belay_guest_text_end);
    // SAFETY: both symbols lie in one read-only section of this program, end behind start, with initialised bytes between.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
