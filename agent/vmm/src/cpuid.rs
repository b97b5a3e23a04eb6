//! The CPUID that a guest sees: what KVM supports, with what only the VMM knows filled in.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::error::VmmError;
use crate::snapshot::SnapshotError;

/// CPUID.1:EBX, the initial APIC id.
const LEAF1_EBX_APIC_ID_SHIFT: u32 = 24;
/// CPUID.1:EBX, logical processors of the package.
const LEAF1_EBX_COUNT_SHIFT: u32 = 16;
/// CPUID.1:EBX, `clflush` line size in 8 bytes.
const LEAF1_EBX_CLFLUSH: u32 = 8 << 8;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Set for every guest of a hypervisor, without which Linux takes no kvm-clock. KVM's supported
/// list lacks it on some hosts.
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// OSXSAVE, which the guest's own CR4 switches, and what [`template`] sets.
const LEAF1_ECX_VMM: u32 = 1 << 27 | LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE;

/// The type field of leaves 4 and 0x8000001d, which is 0 after the last cache.
const CACHE_TYPE_BITS: u32 = 5;

/// The first hypervisor leaf: the signature, and in EAX the highest hypervisor leaf.
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;

/// Asks KVM for what it supports, and fixes what is the same for all vCPUs.
pub fn template(kvm: &Kvm) -> Result<CpuId, VmmError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(VmmError::kvm("tell the CPUID it supports"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            // EAX 0 means 0x40000001 for Linux, but not for every guest.
            KVM_SIGNATURE => entry.eax = entry.eax.max(KVM_FEATURES),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Checks that this host has what the CPUID of a guest from another one promises.
pub fn check_host(kvm: &Kvm, guest: &[kvm_cpuid_entry2]) -> Result<(), SnapshotError> {
    let host = template(kvm).map_err(|e| SnapshotError::Host(e.to_string()))?;
    let missing = |leaf: u32, index: u32, register: &str, bits: u32| {
        SnapshotError::Host(format!(
            "its processor lacks features that the guest uses: CPUID leaf {leaf:#x}.{index}, \
             {register} bits {bits:#x}"
        ))
    };
    for entry in guest {
        let same = |e: &&kvm_cpuid_entry2| (e.function, e.index) == (entry.function, entry.index);
        let host = host.as_slice().iter().find(same).copied();
        let host = host.unwrap_or_default();
        // The registers of features; the others hold numbers, or what this process sets.
        let features = match (entry.function, entry.index) {
            (1, _) => [0, 0, entry.ecx & !LEAF1_ECX_VMM, entry.edx & !LEAF1_EDX_HTT],
            (7, 0 | 1) => [
                if entry.index == 1 { entry.eax } else { 0 },
                entry.ebx,
                entry.ecx,
                entry.edx,
            ],
            (0x8000_0001, _) => [0, 0, entry.ecx, entry.edx],
            (KVM_FEATURES, _) => [entry.eax, 0, 0, 0],
            _ => continue,
        };
        let lacks = features
            .into_iter()
            .zip([host.eax, host.ebx, host.ecx, host.edx])
            .zip(["EAX", "EBX", "ECX", "EDX"])
            .find(|((wanted, has), _)| wanted & !has != 0);
        if let Some(((wanted, has), register)) = lacks {
            return Err(missing(
                entry.function,
                entry.index,
                register,
                wanted & !has,
            ));
        }
    }
    Ok(())
}

/// The CPUID of vCPU `index` of `count`: one socket of `count` cores with one thread each, whose
/// APIC ids are the vCPUs' indexes.
pub fn for_vcpu(template: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = template.clone();
    let id = u32::from(index);
    let count = u32::from(count);
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = (id << LEAF1_EBX_APIC_ID_SHIFT)
                    | (count << LEAF1_EBX_COUNT_SHIFT)
                    | LEAF1_EBX_CLFLUSH
                    | (entry.ebx & 0xff);
                if count > 1 {
                    entry.edx |= LEAF1_EDX_HTT;
                }
            }
            4 => set_cache_sharing_intel(entry, count),
            0xb | 0x1f => set_extended_topology(entry, id, count, core_bits),
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | (count - 1);
            }
            0x8000_001d => set_cache_sharing_amd(entry, count),
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Leaf 4 (Intel): caches 1 and 2 are a core's own, 3 is the socket's.
fn set_cache_sharing_intel(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax.trailing_zeros() >= CACHE_TYPE_BITS {
        return;
    }
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 { count - 1 } else { 0 };
    let cores = count.next_power_of_two() - 1;
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
}

/// Leaf 0x8000001d (AMD): as leaf 4, without the number of cores.
fn set_cache_sharing_amd(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax.trailing_zeros() >= CACHE_TYPE_BITS {
        return;
    }
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 { count - 1 } else { 0 };
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
}

/// Leaves 0xb and 0x1f: level 0 is the thread of a core, level 1 the core of the socket.
fn set_extended_topology(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let (shift, logical, kind) = match entry.index {
        0 => (0, 1, THREAD),
        1 => (core_bits, count, CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = logical;
    entry.ecx = entry.index | kind;
    entry.edx = id;
}
