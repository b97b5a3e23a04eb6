use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use keelson_lab::protocol::{Kind, read_frame, write_frame};

/// Receives a file. It is written beside its place and renamed, so that nobody sees half of it, and
/// a program that runs is replaced, not overwritten.
pub fn put(stream: &mut TcpStream, path: &Path, mode: u32) -> Result<()> {
    let folder = path.parent().filter(|_folder| path.is_absolute());
    let folder = folder.with_context(|| format!("{} is not an absolute path", path.display()))?;
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let mut scratch = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("writing in {}", folder.display()))?;
    loop {
        match read_frame(stream)? {
            Some((Kind::Data, chunk)) => {
                scratch
                    .write_all(&chunk)
                    .with_context(|| format!("writing {}", path.display()))?;
            }
            Some((Kind::End, _)) => break,
            Some((other, _)) => bail!("a {other:?} frame within a file"),
            None => bail!("the client left before the end of the file"),
        }
    }
    scratch
        .as_file()
        .set_permissions(Permissions::from_mode(mode & 0o7777))?;
    scratch
        .persist(path)
        .with_context(|| format!("writing {}", path.display()))?;
    crate::server::send_answer(stream, &())
}

/// Sends a file.
pub fn get(stream: &mut TcpStream, path: &Path) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut chunk = vec![0; 256 << 10];
    loop {
        let length = file
            .read(&mut chunk)
            .with_context(|| format!("reading {}", path.display()))?;
        if length == 0 {
            return Ok(write_frame(stream, Kind::End, &[])?);
        }
        write_frame(stream, Kind::Data, &chunk[..length])?;
    }
}
