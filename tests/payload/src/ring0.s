# The ring-0 stub: everything that only ring 0 may do, and nothing else. On a paravirtual KVM each of
# these instructions is emulated (about a microsecond), so only plain integer instructions are used:
# no SSE, no popcnt, no string compare, no cmpxchg16b.
#
# Selectors: 0x08 ring-0 code, 0x10 ring-0 data, 0x18 ring-3 data, 0x20 ring-3 code, 0x28 TSS.

.set VECTORS, 128
.set SPURIOUS, 127
.set LAPIC_EOI, 0xfee000b0
.set COM1, 0x3f8
.set SERVICES, 12

.section .text.ring0, "ax"

# Entry by the 64-bit Linux boot protocol: long mode, low memory mapped one to one, rsi = zero page.
.global _start
_start:
    cli
    cld
    mov     esp, offset ring0_stack_end
    lgdt    [gdt_pointer]
    lidt    [idt_pointer]
    mov     eax, offset page_map
    mov     cr3, rax
    mov     rax, cr4
    or      eax, 0x600              # OSFXSR, OSXMMEXCPT: ring 3 may use SSE
    mov     cr4, rax
    mov     rax, cr0
    and     eax, 0xfffffff3         # not EM, not TS
    or      eax, 0x10022            # WP, NE, MP
    mov     cr0, rax
    mov     eax, offset task_state
    mov     word ptr [gdt_task_state + 2], ax
    shr     eax, 16
    mov     byte ptr [gdt_task_state + 4], al
    mov     byte ptr [gdt_task_state + 7], ah
    mov     byte ptr [gdt_task_state + 5], 0x89
    mov     eax, 0x28
    ltr     ax
    # Both interrupt controllers of the PC are masked: only MSI and the local APIC interrupt us.
    mov     al, 0xff
    out     0x21, al
    out     0xa1, al
    mov     eax, 0x1b
    mov     ds, eax
    mov     es, eax
    push    0x1b
    push    offset ring3_stack_end
    push    0x202
    push    0x23
    push    offset ring3_start
    iretq

# Ring 3 asks by `ud2` at `service_trap` with the service's number in rdi and arguments in rsi, rdx
# and rcx; the answer is in rax. Any other undefined instruction is a fault.
exception_6:
    cmp     qword ptr [rsp], offset service_trap
    jne     undefined_instruction
    add     qword ptr [rsp], 2
    cmp     rdi, SERVICES
    jae     unknown_service
    jmp     qword ptr [services + rdi * 8]
undefined_instruction:
    push    0
    push    6
    jmp     fault
unknown_service:
    mov     rax, -1
    iretq

service_console_write:              # rsi = bytes, rdx = count
    mov     rcx, rdx
    mov     edx, COM1
    rep     outsb
    iretq

service_wait:                       # until the counter at rsi differs from rdx; interrupts are off here
    cmp     qword ptr [rsi], rdx
    jne     1f
    sti
    hlt
    cli
    jmp     service_wait
1:  iretq

service_out8:                       # rsi = port, rdx = value
    mov     eax, edx
    mov     edx, esi
    out     dx, al
    iretq
service_out16:
    mov     eax, edx
    mov     edx, esi
    out     dx, ax
    iretq
service_out32:
    mov     eax, edx
    mov     edx, esi
    out     dx, eax
    iretq
service_in8:                        # rsi = port
    mov     edx, esi
    xor     eax, eax
    in      al, dx
    iretq
service_in16:
    mov     edx, esi
    xor     eax, eax
    in      ax, dx
    iretq
service_in32:
    mov     edx, esi
    in      eax, dx
    iretq

service_triple_fault:               # an empty IDT, so the next exception can't be delivered
    lidt    [empty_idt_pointer]
    ud2

# A register that the processor doesn't have is a general protection fault (see exception_13), and 1.
service_read_msr:                   # rsi = register, rdx = where its value goes
    mov     r8, rdx
    mov     ecx, esi
msr_read:
    rdmsr
    shl     rdx, 32
    or      rax, rdx
    mov     qword ptr [r8], rax
    xor     eax, eax
    iretq
service_write_msr:                  # rsi = register, rdx = value
    mov     ecx, esi
    mov     eax, edx
    shr     rdx, 32
msr_write:
    wrmsr
    xor     eax, eax
    iretq
msr_refused:
    mov     eax, 1
    iretq

service_stop:
    cli
    hlt
    jmp     service_stop

# An exception becomes a call of `payload_fault(vector, error, rip, cr2, cs)` in ring 3.
fault:
    pop     rdi
    pop     rsi
    mov     rdx, qword ptr [rsp]
    mov     rcx, cr2
    mov     r8, qword ptr [rsp + 8]
    mov     qword ptr [rsp], offset payload_fault
    mov     qword ptr [rsp + 8], 0x23
    mov     qword ptr [rsp + 16], 0x2
    mov     qword ptr [rsp + 24], offset fault_stack_end - 8
    mov     qword ptr [rsp + 32], 0x1b
    iretq

.irp vector, 0,1,2,3,4,5,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
exception_\vector:
    push    0
    push    \vector
    jmp     fault
.endr
exception_13:
    cmp     qword ptr [rsp + 8], offset msr_read
    je      1f
    cmp     qword ptr [rsp + 8], offset msr_write
    je      1f
    push    13
    jmp     fault
1:  mov     qword ptr [rsp + 8], offset msr_refused
    add     rsp, 8
    iretq

.irp vector, 8,10,11,12,14,17,21,29,30
exception_\vector:
    push    \vector
    jmp     fault
.endr

# A device's interrupt: counted by vector and in total, acknowledged to the local APIC.
interrupt:
    inc     qword ptr [interrupt_total]
    push    rax
    mov     eax, LAPIC_EOI
    mov     dword ptr [rax], 0
    pop     rax
    iretq
spurious_interrupt:
    iretq

.altmacro
.macro interrupt_entry vector
interrupt_\vector:
    inc     qword ptr [interrupt_counts + 8 * \vector]
    jmp     interrupt
.endm
.set current, 32
.rept SPURIOUS - 32
    interrupt_entry %current
    .set current, current + 1
.endr

# Ring 3 starts here: clear .bss (a VMM that reboots the guest need not), then go on in Rust.
.section .text.ring3, "ax"
ring3_start:
    mov     rbx, rsi
    mov     edi, offset bss_start
    mov     ecx, offset bss_end
    sub     ecx, edi
    xor     eax, eax
    rep     stosb
    mov     rdi, rbx
    xor     ebp, ebp
    call    payload_main
    ud2

.global supervisor_call
supervisor_call:
service_trap:
    ud2
    ret

.section .rodata.ring0, "a"
.balign 8
services:
    .quad service_console_write, service_wait
    .quad service_out8, service_out16, service_out32
    .quad service_in8, service_in16, service_in32
    .quad service_triple_fault, service_stop
    .quad service_read_msr, service_write_msr


# Handler addresses by vector, from which ring 3 fills in the IDT.
.global vector_handlers
vector_handlers:
.macro exception_address vector
    .quad exception_\vector
.endm
.macro interrupt_address vector
    .quad interrupt_\vector
.endm
.set current, 0
.rept 32
    exception_address %current
    .set current, current + 1
.endr
.rept SPURIOUS - 32
    interrupt_address %current
    .set current, current + 1
.endr
    .quad spurious_interrupt

.section .data.tables, "aw"
.balign 4096
# Identity, 2 MiB pages, usable from ring 3: the low 4 GiB here, more on demand (address_space.rs).
.global page_map
page_map:
    .quad   page_directory_pointers + 7
    .fill   511, 8, 0
page_directory_pointers:
    .quad   page_directories + 0x0007, page_directories + 0x1007
    .quad   page_directories + 0x2007, page_directories + 0x3007
    .fill   508, 8, 0
page_directories:
.set current, 0
.rept 2048
    .quad   current * 0x200000 + 0x87
    .set current, current + 1
.endr

.balign 16
gdt:
    .quad   0
    .quad   0x00af9b000000ffff
    .quad   0x00cf93000000ffff
    .quad   0x00cff3000000ffff
    .quad   0x00affb000000ffff
gdt_task_state:
    .quad   0x0000890000000067, 0
gdt_end:
.balign 16
task_state:
    .long   0
    .quad   ring0_stack_end
    .fill   90, 1, 0
    .word   104
.balign 16
.global interrupt_descriptors
interrupt_descriptors:
    .fill   VECTORS * 2, 8, 0
.balign 8
gdt_pointer:
    .word   gdt_end - gdt - 1
    .quad   gdt
.balign 8
idt_pointer:
    .word   VECTORS * 16 - 1
    .quad   interrupt_descriptors
.balign 8
empty_idt_pointer:
    .word   0
    .quad   0

.section .bss.stacks, "aw", @nobits
.balign 4096
    .skip   4096
ring0_stack_end:
    .skip   16384
fault_stack_end:
    .skip   262144
ring3_stack_end:

.section .bss.interrupts, "aw", @nobits
.balign 8
.global interrupt_counts
interrupt_counts:
    .skip   8 * VECTORS
.global interrupt_total
interrupt_total:
    .skip   8
