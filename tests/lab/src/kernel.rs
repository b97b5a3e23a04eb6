use std::path::{Path, PathBuf};

use crate::LabError;
use crate::error::file;

/// A stock Debian kernel in the cache, as `setup/kernels` leaves it.
#[derive(Debug, Clone)]
pub struct KernelFiles {
    /// `6.1` or `6.12`.
    pub series: String,
    /// The release name, as `uname -r` says it.
    pub release: String,
    /// The kernel as packaged.
    pub bz_image: PathBuf,
    /// The same, uncompressed: an ELF file.
    pub vmlinux: PathBuf,
    /// The module tree, with `modules.dep` and `modules.builtin`.
    pub modules: PathBuf,
}

impl KernelFiles {
    /// Finds a kernel series in the cache.
    pub fn find(series: &str) -> Result<Self, LabError> {
        let folder = cache_folder().join("kernels").join(series);
        let missing = || LabError::KernelMissing {
            series: series.to_owned(),
            folder: folder.clone(),
        };
        if series.is_empty() || series.contains('/') || series.starts_with('.') {
            return Err(missing());
        }
        // `release` is written last: where it is, the folder is complete.
        let release =
            std::fs::read_to_string(folder.join("release")).map_err(|_error| missing())?;
        Ok(Self {
            series: series.to_owned(),
            release: release.trim().to_owned(),
            bz_image: folder.join("bzImage"),
            vmlinux: folder.join("vmlinux"),
            modules: folder.join("modules"),
        })
    }
}

/// Where kernels, built tools and images are kept: `$KEELSON_CACHE`, else `$HOME/.cache/keelson`.
pub fn cache_folder() -> PathBuf {
    std::env::var_os("KEELSON_CACHE")
        .filter(|value| !value.is_empty())
        .map_or_else(
            || {
                let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
                Path::new(&home).join(".cache/keelson")
            },
            PathBuf::from,
        )
}

/// Makes `folder` of the cache exist, and returns its path.
pub(crate) fn cache_subfolder(name: &str) -> Result<PathBuf, LabError> {
    let folder = cache_folder().join(name);
    std::fs::create_dir_all(&folder).map_err(file("make", &folder))?;
    Ok(folder)
}
