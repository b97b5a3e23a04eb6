//! Who a member is, written when it first starts: flags say so only once.

use prost::Message;

use crate::MemberError;
use crate::disk::Disk;

/// Names of the file and of its copy, which is there for when the first is damaged.
const FILES: [&str; 2] = ["identity", "identity.copy"];
const NEW_FILE: &str = "identity.new";
/// The first, without what is needed to be rebuilt, was never released.
const FORMAT: u64 = 2;

/// A member and its cluster.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Identity {
    /// Format of the data folder.
    #[prost(uint64, tag = "1")]
    format: u64,
    /// The cluster.
    #[prost(uint64, tag = "2")]
    pub cluster_id: u64,
    /// The member; not 0.
    #[prost(uint64, tag = "3")]
    pub member_id: u64,
    /// Where the other members were last known to be, for when nothing else in the folder says so.
    #[prost(string, repeated, tag = "4")]
    pub peer_urls: Vec<String>,
    /// Its data is being made for the first time: what there is of it may be anything.
    #[prost(bool, tag = "5")]
    is_beginning: bool,
}

impl Identity {
    /// A new member's.
    pub fn new(cluster_id: u64, member_id: u64) -> Self {
        Self {
            format: FORMAT,
            cluster_id,
            member_id,
            peer_urls: Vec::new(),
            is_beginning: false,
        }
    }

    /// The identity of a member whose data is only being made.
    #[must_use]
    pub fn beginning(&self) -> Self {
        Self {
            is_beginning: true,
            ..self.clone()
        }
    }

    /// Whether its data was made, once.
    pub fn has_begun(&self) -> bool {
        !self.is_beginning
    }

    /// Whose folder it is; `None` if it has no member yet.
    pub fn load(disk: &dyn Disk) -> Result<Option<Self>, MemberError> {
        let copies = FILES.map(|name| load(disk, name));
        let damaged = copies.iter().any(|copy| !matches!(copy, Ok(Some(_))));
        let mut failure = None;
        for copy in copies {
            match copy {
                Ok(Some(identity)) => {
                    if damaged {
                        tracing::warn!("a copy of the identity is damaged, and is written anew");
                        identity.store(disk)?;
                    }
                    return Ok(Some(identity));
                }
                Ok(None) => {}
                Err(error) if error.is_damage() => failure = Some(error),
                Err(error) => return Err(error),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    /// Writes it, durably.
    pub fn store(&self, disk: &dyn Disk) -> Result<(), MemberError> {
        let mut bytes = self.encode_to_vec();
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        for name in FILES {
            let what = || MemberError::disk(format!("write {name}"));
            let file = disk.open(NEW_FILE, true).map_err(what())?;
            file.set_length(0).map_err(what())?;
            file.write_at(&bytes, 0).map_err(what())?;
            file.sync_data().map_err(what())?;
            disk.rename(NEW_FILE, name).map_err(what())?;
            disk.sync().map_err(what())?;
        }
        Ok(())
    }
}

fn load(disk: &dyn Disk, name: &str) -> Result<Option<Identity>, MemberError> {
    let file = match disk.open(name, false) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(MemberError::disk(format!("open {name}"))(error)),
    };
    let what = || MemberError::disk(format!("read {name}"));
    let corrupt = || MemberError::Corrupt(format!("the file {name} fails its checksum"));
    let length = usize::try_from(file.length().map_err(what())?).unwrap_or(usize::MAX);
    if length > 64 * 1024 {
        return Err(corrupt());
    }
    let mut bytes = vec![0; length];
    file.read_at(&mut bytes, 0).map_err(what())?;
    let (body, sum) = bytes.split_last_chunk::<4>().ok_or_else(corrupt)?;
    if crc32fast::hash(body).to_le_bytes() != *sum {
        return Err(corrupt());
    }
    let identity = <Identity as Message>::decode(body).map_err(|_| corrupt())?;
    match identity.format {
        FORMAT => Ok(Some(identity)),
        format if format > FORMAT => Err(MemberError::Newer {
            what: "the data folder".into(),
            found: format,
            known: FORMAT,
        }),
        format => Err(MemberError::Older {
            what: "the data folder".into(),
            found: format,
            known: FORMAT,
        }),
    }
}
