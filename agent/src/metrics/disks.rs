//! What the keelson-blk processes of all guests count, on one page.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use futures::future::join_all;

use crate::guest::{ServedDisk, served_disks};
use crate::{Agent, error::Result};

/// The metrics of all disks that are being served, each with the label `guest`. One whose keelson-blk
/// doesn't answer is on it with `keelson_blk_up 0`.
pub(super) async fn page(agent: &Agent) -> Result<String> {
    let served = served_disks(agent).await?;
    let pages = join_all(served.iter().map(ServedDisk::metrics)).await;
    let mut merged = MergedPages::default();
    for (disk, page) in served.iter().zip(pages) {
        if let Err(error) = &page {
            tracing::warn!(disk = disk.disk, guest = disk.guest, %error, "metrics are missing");
        }
        merged.add(&disk.guest, &disk.attachment, page.ok().as_deref());
    }
    Ok(merged.text())
}

/// Pages of several processes, whose metrics have to be together by their names.
#[derive(Debug, Default)]
struct MergedPages {
    /// By the metric's name: its help and type, and its samples.
    families: BTreeMap<String, (String, String)>,
    up: String,
}

impl MergedPages {
    fn add(&mut self, guest: &str, disk: &str, page: Option<&str>) {
        let up = u8::from(page.is_some());
        // Writing to a string can't fail. Names of guests and disks need no escaping.
        let _ = writeln!(
            self.up,
            "keelson_blk_up{{guest=\"{guest}\",disk=\"{disk}\"}} {up}"
        );
        let mut family: Option<&mut (String, String)> = None;
        let mut is_new = false;
        for text in page.unwrap_or_default().lines() {
            if let Some(help) = text.strip_prefix("# HELP ") {
                let name = help.split(' ').next().unwrap_or_default();
                is_new = !self.families.contains_key(name);
                family = Some(self.families.entry(name.into()).or_default());
            }
            let Some((about, samples)) = &mut family else {
                continue;
            };
            if text.starts_with('#') {
                if is_new {
                    let _ = writeln!(about, "{text}");
                }
            } else if let Some((name, rest)) = text.split_once('{') {
                let _ = writeln!(samples, "{name}{{guest=\"{guest}\",{rest}");
            }
        }
    }

    fn text(self) -> String {
        if self.up.is_empty() {
            return String::new();
        }
        let mut text = format!(
            "# HELP keelson_blk_up Whether the keelson-blk of a guest's disk answers.\n\
             # TYPE keelson_blk_up gauge\n{}",
            self.up
        );
        for (about, samples) in self.families.into_values() {
            text.push_str(&about);
            text.push_str(&samples);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_is_explained_once_and_has_the_samples_of_all_guests() {
        let page = "# HELP keelson_blk_reads_total Reads.\n# TYPE keelson_blk_reads_total counter\n\
                    keelson_blk_reads_total{disk=\"root\",queue=\"0\"} 7\n\
                    # HELP keelson_blk_size_bytes Size.\n# TYPE keelson_blk_size_bytes gauge\n\
                    keelson_blk_size_bytes{disk=\"root\"} 512\n";
        let mut merged = MergedPages::default();
        merged.add("a", "root", Some(page));
        merged.add("b", "root", Some(page));
        merged.add("c", "root", None);
        assert_eq!(
            merged.text(),
            "# HELP keelson_blk_up Whether the keelson-blk of a guest's disk answers.\n\
             # TYPE keelson_blk_up gauge\n\
             keelson_blk_up{guest=\"a\",disk=\"root\"} 1\n\
             keelson_blk_up{guest=\"b\",disk=\"root\"} 1\n\
             keelson_blk_up{guest=\"c\",disk=\"root\"} 0\n\
             # HELP keelson_blk_reads_total Reads.\n# TYPE keelson_blk_reads_total counter\n\
             keelson_blk_reads_total{guest=\"a\",disk=\"root\",queue=\"0\"} 7\n\
             keelson_blk_reads_total{guest=\"b\",disk=\"root\",queue=\"0\"} 7\n\
             # HELP keelson_blk_size_bytes Size.\n# TYPE keelson_blk_size_bytes gauge\n\
             keelson_blk_size_bytes{guest=\"a\",disk=\"root\"} 512\n\
             keelson_blk_size_bytes{guest=\"b\",disk=\"root\"} 512\n"
        );
        assert_eq!(MergedPages::default().text(), "");
    }
}
