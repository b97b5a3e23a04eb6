//! The functions that compiled Rust refers to and that a C library or `std` would bring.

use core::arch::global_asm;

// In assembly: in Rust the compiler would turn their loops into calls of themselves.
global_asm!(
    r#"
.section .text.intrinsics, "ax"
.global memcpy
memcpy:
    mov     rax, rdi
    mov     rcx, rdx
    rep     movsb
    ret

.global memmove
memmove:
    mov     rax, rdi
    mov     rcx, rdx
    sub     rdi, rsi
    cmp     rdi, rdx                # destination inside the source: copy backwards
    lea     rdi, [rdi + rsi]
    jb      2f
    rep     movsb
    ret
2:  lea     rdi, [rdi + rcx - 1]
    lea     rsi, [rsi + rcx - 1]
    std
    rep     movsb
    cld
    ret

.global memset
memset:
    mov     r8, rdi
    mov     eax, esi
    mov     rcx, rdx
    rep     stosb
    mov     rax, r8
    ret

.global memcmp
.global bcmp
memcmp:
bcmp:
    xor     ecx, ecx
2:  cmp     rcx, rdx
    je      3f
    movzx   eax, byte ptr [rdi + rcx]
    movzx   r8d, byte ptr [rsi + rcx]
    inc     rcx
    sub     eax, r8d
    je      2b
    ret
3:  xor     eax, eax
    ret

# Named by the unwind tables of the prebuilt `core`, which are left out: nothing here unwinds.
.global rust_eh_personality
rust_eh_personality:
    ud2
"#
);
