//! Who a member is, written when it first starts: flags say so only once.

use prost::Message;

use crate::MemberError;
use crate::disk::Disk;

/// Name of the file.
const FILE: &str = "identity";
const NEW_FILE: &str = "identity.new";
const FORMAT: u64 = 1;

/// A member and its cluster.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
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
}

impl Identity {
    /// A new member's.
    pub fn new(cluster_id: u64, member_id: u64) -> Self {
        Self {
            format: FORMAT,
            cluster_id,
            member_id,
        }
    }

    /// Whose folder it is; `None` if it is empty.
    pub fn load(disk: &dyn Disk) -> Result<Option<Self>, MemberError> {
        let file = match disk.open(FILE, false) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(MemberError::disk(format!("open {FILE}"))(error)),
        };
        let what = || MemberError::disk(format!("read {FILE}"));
        let corrupt = || MemberError::Corrupt(format!("the file {FILE} fails its checksum"));
        let length = usize::try_from(file.length().map_err(what())?).unwrap_or(usize::MAX);
        if length > 1024 {
            return Err(corrupt());
        }
        let mut bytes = vec![0; length];
        file.read_at(&mut bytes, 0).map_err(what())?;
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or_else(corrupt)?;
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return Err(corrupt());
        }
        let identity = <Self as Message>::decode(body).map_err(|_| corrupt())?;
        if identity.format > FORMAT {
            return Err(MemberError::Newer {
                what: "the data folder".into(),
                found: identity.format,
                known: FORMAT,
            });
        }
        Ok(Some(identity))
    }

    /// Writes it, durably.
    pub fn store(&self, disk: &dyn Disk) -> Result<(), MemberError> {
        let what = || MemberError::disk(format!("write {FILE}"));
        let mut bytes = self.encode_to_vec();
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        let file = disk.open(NEW_FILE, true).map_err(what())?;
        file.set_length(0).map_err(what())?;
        file.write_at(&bytes, 0).map_err(what())?;
        file.sync_data().map_err(what())?;
        disk.rename(NEW_FILE, FILE).map_err(what())?;
        disk.sync().map_err(what())
    }
}
