//! The CPUID that a guest sees: what KVM supports, with what only the VMM knows filled in.

mod templates;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::config::{CpuTemplate, Topology};
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

/// Asks KVM for what it supports, keeps what `model` has, and fixes what is the same for all vCPUs.
pub fn template(kvm: &Kvm, model: CpuTemplate) -> Result<CpuId, VmmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(VmmError::kvm("tell the CPUID it supports"))?;
    let mut entries = supported.as_slice().to_vec();
    templates::apply(model, &mut entries)?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
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
    add_topology_leaves(&mut entries);
    CpuId::from_entries(&entries).map_err(|_| {
        VmmError::kvm("take so many CPUID entries")(kvm_ioctls::Error::new(libc::E2BIG))
    })
}

/// What this host offers, for [`check_host`].
pub fn offered(kvm: &Kvm) -> Result<CpuId, SnapshotError> {
    template(kvm, CpuTemplate::Host).map_err(|e| SnapshotError::Host(e.to_string()))
}

/// Checks that a host that offers `host` has what the CPUID of a guest from another one promises.
pub fn check_host(host: &CpuId, guest: &[kvm_cpuid_entry2]) -> Result<(), SnapshotError> {
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

/// The CPUID of the vCPU with `apic_id`, in `topology`.
pub fn for_vcpu(template: &CpuId, apic_id: u32, topology: Topology) -> CpuId {
    let mut cpuid = template.clone();
    let threads = u32::from(topology.threads);
    let in_socket = u32::from(topology.cores) * threads;
    let several = u32::from(topology.sockets) * in_socket > 1;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                // Logical processors of a socket, as ids that are set aside for them.
                let count = in_socket.next_power_of_two().min(0xff);
                entry.ebx = (apic_id << LEAF1_EBX_APIC_ID_SHIFT)
                    | (count << LEAF1_EBX_COUNT_SHIFT)
                    | LEAF1_EBX_CLFLUSH
                    | (entry.ebx & 0xff);
                if several {
                    entry.edx |= LEAF1_EDX_HTT;
                }
            }
            4 => set_cache_sharing_intel(entry, topology),
            0xb | 0x1f => set_extended_topology(entry, apic_id, topology),
            0x8000_0008 => {
                let bits = topology.socket_bits();
                entry.ecx = (entry.ecx & !0xf0ff) | (bits << 12) | (in_socket - 1);
            }
            0x8000_001d => set_cache_sharing_amd(entry, topology),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = (apic_id >> topology.thread_bits()) & 0xff | (threads - 1) << 8;
                entry.ecx = apic_id >> topology.socket_bits();
            }
            _ => {}
        }
    }
    cpuid
}

/// How many ids share a cache of `level`, less one: 1 and 2 are a core's own, 3 is the socket's.
fn sharing(level: u32, topology: Topology) -> u32 {
    let bits = if level >= 3 {
        topology.socket_bits()
    } else {
        topology.thread_bits()
    };
    (1 << bits) - 1
}

/// Leaf 4 (Intel).
fn set_cache_sharing_intel(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax.trailing_zeros() >= CACHE_TYPE_BITS {
        return;
    }
    let sharing = sharing((entry.eax >> 5) & 7, topology);
    let cores = (1 << (topology.socket_bits() - topology.thread_bits())) - 1;
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
}

/// Leaf 0x8000001d (AMD): as leaf 4, without the number of cores.
fn set_cache_sharing_amd(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax.trailing_zeros() >= CACHE_TYPE_BITS {
        return;
    }
    let sharing = sharing((entry.eax >> 5) & 7, topology);
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
}

/// Leaves 0xb and 0x1f: level 0 is the thread of a core, level 1 the core of the socket.
fn set_extended_topology(entry: &mut kvm_cpuid_entry2, apic_id: u32, topology: Topology) {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let threads = u32::from(topology.threads);
    let (shift, logical, kind) = match entry.index {
        0 => (topology.thread_bits(), threads, THREAD),
        1 => (
            topology.socket_bits(),
            u32::from(topology.cores) * threads,
            CORE,
        ),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = logical;
    entry.ecx = entry.index | kind;
    entry.edx = apic_id;
}

/// Adds the levels that KVM's list may lack: without leaf 0xb a guest guesses its topology.
fn add_topology_leaves(entries: &mut Vec<kvm_cpuid_entry2>) {
    for index in 0..=2 {
        let same = |e: &kvm_cpuid_entry2| (e.function, e.index) == (0xb, index);
        if !entries.iter().any(same) {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..Default::default()
            });
        }
    }
    for entry in entries.iter_mut().filter(|entry| entry.function == 0) {
        entry.eax = entry.eax.max(0xb);
    }
}
