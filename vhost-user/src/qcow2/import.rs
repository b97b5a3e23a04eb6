//! From qcow2 to a sparse raw file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Cluster, Qcow2Error, Qcow2Image, ReadAt};

/// Stretches of zeroes from this size on become holes, in bytes.
const HOLE: usize = 4096;

/// Writes the disk in `source` to a new raw file, and makes it durable. `progress` is told how
/// many bytes of how many are done.
///
/// A file that couldn't be written whole is removed.
pub fn import(
    source: impl ReadAt,
    target: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<u64, Qcow2Error> {
    let mut image = Qcow2Image::open(source)?;
    let create = OpenOptions::new().write(true).create_new(true).open(target);
    let file = create.map_err(failed("create the raw file"))?;
    let copied = copy(&mut image, &file, &mut progress);
    if copied.is_err() {
        let _ = std::fs::remove_file(target);
    }
    copied
}

fn copy(
    image: &mut Qcow2Image<impl ReadAt>,
    file: &File,
    progress: &mut impl FnMut(u64, u64),
) -> Result<u64, Qcow2Error> {
    let header = image.header().clone();
    let size = header.bytes;
    file.set_len(size)
        .map_err(failed("set the size of the raw file"))?;
    let cluster_bytes = header.cluster_bytes();
    let mut buffer = vec![0; usize::try_from(cluster_bytes).unwrap_or(0)];
    for index in 0..header.clusters() {
        let start = index * cluster_bytes;
        if image.read_cluster(index, &mut buffer)? == Cluster::Data {
            let left = usize::try_from(size - start).unwrap_or(usize::MAX);
            let data = buffer.get(..left.min(buffer.len())).unwrap_or_default();
            write_sparse(file, data, start).map_err(failed("write the raw file"))?;
        }
        progress((start + cluster_bytes).min(size), size);
    }
    file.sync_all().map_err(failed("write the raw file"))?;
    Ok(size)
}

fn write_sparse(file: &File, data: &[u8], start: u64) -> io::Result<()> {
    let is_zero = |part: &[u8]| part.iter().all(|byte| *byte == 0);
    let mut place = start;
    // Neighbours that are both data are written in one go.
    for run in data
        .chunks(HOLE)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        let len: usize = run.iter().map(|part: &&[u8]| <[u8]>::len(part)).sum();
        let from = usize::try_from(place - start).unwrap_or(usize::MAX);
        if run.first().is_some_and(|part| !is_zero(part)) {
            file.write_all_at(data.get(from..from + len).unwrap_or_default(), place)?;
        }
        place += len as u64;
    }
    Ok(())
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> Qcow2Error {
    move |source| Qcow2Error::Io { action, source }
}
