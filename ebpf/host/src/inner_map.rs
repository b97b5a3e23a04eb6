//! Maps that are put into maps of maps.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use aya::maps::{MapData, MapError};
use aya::programs::SchedClassifier;
use aya::sys::SyscallError;
use keelson_ebpf_common::map_name;

use crate::error::DatapathError;
use crate::object::chain;

/// `BPF_MAP_DELETE_ELEM` of `enum bpf_cmd` (linux/bpf.h).
const MAP_DELETE_ELEM: libc::c_int = 3;
/// `BPF_BTF_GET_FD_BY_ID` of `enum bpf_cmd` (linux/bpf.h).
const BTF_GET_FD_BY_ID: libc::c_int = 19;

/// How the object defines them, with its type information: before Linux 6.2 a map without any does
/// not match one that has it.
#[derive(Debug)]
pub struct InnerMaps {
    definitions: BTreeMap<&'static str, aya_obj::Map>,
    types: Option<OwnedFd>,
}

impl InnerMaps {
    /// As `object` defines them; `program` is one of its programs, loaded.
    pub fn new(object: &[u8], program: &SchedClassifier) -> Result<Self, DatapathError> {
        let failed = |problem: String| DatapathError::Load {
            what: "the definitions of inner maps".into(),
            problem,
        };
        let object = aya_obj::Object::parse(object).map_err(|error| failed(chain(&error)))?;
        let mut definitions = BTreeMap::new();
        for name in [
            map_name::FLOWS,
            map_name::OPENING_FLOWS,
            map_name::FRAGMENTS,
            map_name::TRANSLATIONS,
            map_name::NAT_PORTS,
            map_name::NAT_MAPPINGS,
        ] {
            let inner = object.maps.get(name).and_then(aya_obj::Map::inner);
            let inner = inner.ok_or_else(|| failed(format!("{name} has none")))?;
            definitions.insert(name, inner);
        }
        let info = program.info().map_err(|error| failed(chain(&error)))?;
        let types = info.btf_id().map(open_types).transpose();
        let types =
            types.map_err(|error| failed(format!("opening their types failed: {error}")))?;
        Ok(Self { definitions, types })
    }

    /// Creates one for the map of maps `name`.
    pub fn create(&self, name: &'static str, entries: u32) -> Result<MapData, DatapathError> {
        let definition = self.definitions.get(name).cloned();
        let mut definition = definition.ok_or_else(|| DatapathError::Load {
            what: format!("a map for {name}"),
            problem: "it is no map of maps".into(),
        })?;
        definition.set_max_entries(entries.max(1));
        let types = self.types.as_ref().map(|types| types.as_fd());
        MapData::create(definition, name, types).map_err(DatapathError::map("create", name))
    }
}

/// Takes the map at `index` out of a pinned array of maps.
pub fn remove(array: &Path, index: u32) -> Result<(), MapError> {
    let array = MapData::from_pin(array)?;
    let descriptor = array.fd().as_fd().as_raw_fd();
    // The map's descriptor, padding, and where the key is; the kernel takes the rest as zero.
    let attributes = [
        u64::from(descriptor.cast_unsigned()),
        (&raw const index) as u64,
    ];
    // SAFETY: the kernel reads the attributes, whose size is given, and the key, which lives through the
    // call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            MAP_DELETE_ELEM,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    let error = std::io::Error::last_os_error();
    match result {
        0 => Ok(()),
        _ if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        _ => Err(SyscallError {
            call: "bpf_map_delete_elem",
            io_error: error,
        }
        .into()),
    }
}

fn open_types(id: u32) -> std::io::Result<OwnedFd> {
    // The attributes begin with the id; the kernel takes the rest as zero.
    let attributes = [id, 0, 0, 0];
    // SAFETY: the kernel reads the attributes, whose size is given, and nothing else of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BTF_GET_FD_BY_ID,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    match libc::c_int::try_from(result) {
        // SAFETY: a new descriptor that nobody else has.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}
