//! Power is lost at every point of an overlay's work: what was flushed is there afterwards, what
//! was not is old or new sector by sector, and nothing is torn or from elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::large_types_passed_by_value,
    reason = "in tests"
)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use keelson_blk::overlay::chain::Bottom;
use keelson_blk::overlay::header::{Base, Header};
use keelson_blk::overlay::striped_file::StripedOptions;
use keelson_blk::overlay::{Chain, Storage, StripedFile};
use keelson_blk::sector_cipher::SectorCipher;

const SECTOR: u64 = 512;
type Sector = [u8; 512];

/// Small and repeatable randomness.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A disk with a volatile cache: a power cut loses any part of what was not synced.
#[derive(Debug, Default)]
struct CachedDisk(Mutex<CacheState>);

#[derive(Debug, Default)]
struct CacheState {
    durable: HashMap<u64, Sector>,
    /// All versions of each sector since the last sync.
    cache: BTreeMap<u64, Vec<Sector>>,
    /// Operations until the power is lost.
    fuse: Option<u64>,
    operations: u64,
}

impl CacheState {
    fn step(&mut self) -> io::Result<()> {
        self.operations += 1;
        match &mut self.fuse {
            Some(0) => return Err(io::Error::other("the power is lost")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }

    fn put(&mut self, sector: u64, bytes: Sector) {
        self.cache.entry(sector).or_default().push(bytes);
    }
}

impl CachedDisk {
    fn operations(&self) -> u64 {
        self.0.lock().unwrap().operations
    }

    fn set_fuse(&self, operations: u64) {
        self.0.lock().unwrap().fuse = Some(operations);
    }

    /// What is found after a power cut. Before `data` there may be garbage where a sector was
    /// being written; a disk's sectors are written whole.
    fn after_power_cut(&self, random: &mut Random, data: u64) -> Self {
        let mut state = self.0.lock().unwrap();
        let mut durable = std::mem::take(&mut state.durable);
        for (sector, versions) in std::mem::take(&mut state.cache) {
            let choice = usize::try_from(random.below(versions.len() as u64 + 1)).unwrap();
            if let Some(version) = versions.get(choice) {
                durable.insert(sector, *version);
            } else if sector * SECTOR < data && random.below(3) == 0 {
                let mut torn = versions[0];
                torn[usize::try_from(random.below(512)).unwrap()] ^= 0x5a;
                durable.insert(sector, torn);
            }
        }
        Self(Mutex::new(CacheState {
            durable,
            ..CacheState::default()
        }))
    }
}

impl Storage for CachedDisk {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        for (sector, part) in (offset / SECTOR..).zip(buffer.chunks_exact_mut(512)) {
            let cached = state.cache.get(&sector).and_then(|all| all.last());
            let found = cached.or_else(|| state.durable.get(&sector));
            part.copy_from_slice(found.unwrap_or(&[0; 512]));
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(SECTOR) && bytes.len().is_multiple_of(512));
        let mut state = self.0.lock().unwrap();
        // A cut in the middle leaves a part of the write in the cache.
        let mut done = Ok(());
        let sectors = bytes.chunks_exact(512).enumerate();
        for (index, part) in sectors {
            if index % 64 == 0 {
                done = state.step();
                if done.is_err() {
                    break;
                }
            }
            state.put(offset / SECTOR + index as u64, part.try_into().unwrap());
        }
        done
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.step()?;
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            state.put(sector, [0; 512]);
        }
        Ok(())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        self.0.lock().unwrap().step()
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.step()?;
        for (sector, mut versions) in std::mem::take(&mut state.cache) {
            state.durable.insert(sector, versions.pop().unwrap());
        }
        Ok(())
    }
}

/// A base whose every sector says where it is from.
#[derive(Debug)]
struct StampedBase;

fn stamp(origin: u64, sector: u64) -> Sector {
    let mut bytes = [0; 512];
    for (index, part) in (0_u64..).zip(bytes.chunks_exact_mut(16)) {
        part[..8].copy_from_slice(&(origin ^ index).to_le_bytes());
        part[8..].copy_from_slice(&sector.to_le_bytes());
    }
    bytes
}

const BASE: u64 = 0xba5e << 32;

impl Storage for StampedBase {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        for (sector, part) in (offset / SECTOR..).zip(buffer.chunks_exact_mut(512)) {
            part.copy_from_slice(&stamp(BASE, sector));
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        panic!("a base is never written")
    }

    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("a base is never written")
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("a base is never written")
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

// Stripes of several blocks of the map, at the end of the base and behind it.
const BLOCK_SPAN: u64 = 32512 * 64 * 1024;
const BASE_BYTES: u64 = BLOCK_SPAN + 3 * 64 * 1024 + 512;
const DISK_BYTES: u64 = 2 * BLOCK_SPAN + 64 * 1024;

fn header(cipher: Option<&SectorCipher>) -> Header {
    Header {
        uuid: uuid::Uuid::from_u128(7),
        generation: 1,
        opened: 0,
        bytes: DISK_BYTES,
        stripe_bytes: 64 * 1024,
        map_capacity: 4,
        sealed: false,
        key_check: cipher.map(|cipher| cipher.key_check([1; 16])),
        base: Base::Raw {
            path: "base".into(),
            bytes: BASE_BYTES,
            digest: [0; 32],
            modified: (0, 0),
        },
    }
}

fn open(disk: &Arc<CachedDisk>, cipher: Option<&Arc<SectorCipher>>) -> io::Result<Chain> {
    let options = StripedOptions {
        cipher: cipher.cloned(),
        ..StripedOptions::default()
    };
    let storage = Arc::clone(disk) as Arc<dyn Storage>;
    let file = StripedFile::open(storage, Path::new("overlay"), options);
    let file = file.map_err(io::Error::other)?;
    Chain::new(
        vec![Arc::new(file)],
        Bottom::Raw(Arc::new(StampedBase), BASE_BYTES),
    )
}

/// What each sector that was touched may hold.
#[derive(Default)]
struct Model(BTreeMap<u64, Vec<Sector>>);

impl Model {
    fn original(sector: u64) -> Sector {
        if sector * SECTOR < BASE_BYTES {
            stamp(BASE, sector)
        } else {
            [0; 512]
        }
    }

    fn possible(&mut self, sector: u64) -> &mut Vec<Sector> {
        let original = Self::original(sector);
        self.0.entry(sector).or_insert_with(|| vec![original])
    }

    fn add(&mut self, sector: u64, value: Sector) {
        self.possible(sector).push(value);
    }

    fn flushed(&mut self) {
        for versions in self.0.values_mut() {
            let last = *versions.last().unwrap();
            *versions = vec![last];
        }
    }
}

// A few places, so that operations meet: stripe starts of both blocks and behind the base.
fn place(random: &mut Random) -> (u64, u64) {
    const STRIPES: [u64; 5] = [0, 1, 32512, 32512 + 3, 2 * 32512];
    let stripe = STRIPES[usize::try_from(random.below(5)).unwrap()] * 64 * 1024;
    let (first, sectors) = match random.below(4) {
        0 => (0, 128),
        1 => (random.below(100), 1 + random.below(60)),
        _ => (random.below(120), 1 + random.below(8)),
    };
    let start = stripe / SECTOR + first;
    (start, sectors.min(DISK_BYTES / SECTOR - start))
}

/// Works on the disk until it is done or the power is lost. Returns the operations of the disk.
fn work(chain: &Chain, model: &mut Model, random: &mut Random, sequence: &mut u64) -> bool {
    for _ in 0..14 {
        let (start, sectors) = place(random);
        let (offset, len) = (start * SECTOR, sectors * SECTOR);
        let kind = random.below(10);
        let done = match kind {
            0..=4 => {
                *sequence += 1;
                let mut bytes = Vec::new();
                for sector in start..start + sectors {
                    let value = stamp(*sequence << 8, sector);
                    model.add(sector, value);
                    bytes.extend_from_slice(&value);
                }
                chain.write(&bytes, offset)
            }
            5 => {
                for sector in start..start + sectors {
                    model.add(sector, [0; 512]);
                }
                chain.write_zeroes(offset, len)
            }
            6 => discard(chain, model, start, sectors),
            _ => {
                let done = chain.flush();
                if done.is_ok() {
                    model.flushed();
                }
                done
            }
        };
        if done.is_err() {
            return false;
        }
    }
    true
}

// A discarded sector may be either; what it is now, it stays.
fn discard(chain: &Chain, model: &mut Model, start: u64, sectors: u64) -> io::Result<()> {
    for sector in start..start + sectors {
        let before = *model.possible(sector).last().unwrap();
        model.add(sector, [0; 512]);
        model.add(sector, before);
    }
    chain.discard(start * SECTOR, sectors * SECTOR)?;
    for sector in start..start + sectors {
        let mut now = [0; 512];
        chain.read(&mut now, sector * SECTOR)?;
        let possible = model.possible(sector);
        assert!(possible.contains(&now));
        possible.push(now);
    }
    Ok(())
}

fn check(chain: &Chain, model: &mut Model, what: &str) {
    for (sector, possible) in &mut model.0 {
        let mut found = [0; 512];
        chain.read(&mut found, sector * SECTOR).unwrap();
        assert!(
            possible.contains(&found),
            "{what}: sector {sector} holds none of the {} values that it may",
            possible.len()
        );
        *possible = vec![found];
    }
}

/// Loses power after each number of operations of one run, and twice more in what follows.
fn lose_power_everywhere(seed: u64, cipher: Option<&Arc<SectorCipher>>) -> u64 {
    let data = header(None).data_offset();
    let mut cuts = 0;
    for fuse in 0.. {
        let mut random = Random(seed);
        let mut disk = Arc::new(CachedDisk::default());
        StripedFile::format(disk.as_ref(), &header(cipher.map(AsRef::as_ref))).unwrap();
        disk.set_fuse(fuse);
        let mut model = Model::default();
        let mut sequence = 0;
        let mut finished = false;
        for life in 0..3 {
            let what = format!("seed {seed}, cut after {fuse}, life {life}");
            if let Ok(chain) = open(&disk, cipher) {
                check(&chain, &mut model, &what);
                finished = work(&chain, &mut model, &mut random, &mut sequence) && life == 0;
                if finished {
                    check_last(&chain, &mut model, &what);
                    break;
                }
            }
            cuts += 1;
            disk = Arc::new(disk.after_power_cut(&mut random, data));
            disk.set_fuse(random.below(60));
        }
        let disk = Arc::new(disk.after_power_cut(&mut random, data));
        let chain = open(&disk, cipher).expect("it opens after every cut");
        check(
            &chain,
            &mut model,
            &format!("seed {seed}, cut after {fuse}, at the end"),
        );
        if finished {
            break;
        }
    }
    cuts
}

// Without a cut the last write counts, flushed or not.
fn check_last(chain: &Chain, model: &mut Model, what: &str) {
    for (sector, possible) in &model.0 {
        let mut found = [0; 512];
        chain.read(&mut found, sector * SECTOR).unwrap();
        assert_eq!(possible.last(), Some(&found), "{what}: sector {sector}");
    }
}

#[test]
fn no_power_cut_loses_what_was_flushed() {
    let cuts: u64 = (1..=8)
        .map(|seed| lose_power_everywhere(seed * 7919, None))
        .sum();
    println!("{cuts} power cuts");
    assert!(cuts > 500, "{cuts} power cuts");
}

#[test]
fn nor_on_an_encrypted_overlay() {
    let key: Vec<u8> = (0..64).collect();
    let cipher = Arc::new(SectorCipher::new(&key).unwrap());
    assert!(lose_power_everywhere(4711, Some(&cipher)) > 30);
}

#[test]
#[ignore = "thousands of cuts: run it by name"]
fn thousands_of_power_cuts() {
    let cuts: u64 = (1..=150)
        .map(|seed| lose_power_everywhere(seed * 104_729, None))
        .sum();
    println!("{cuts} power cuts");
}

#[test]
fn a_failed_sync_through_the_page_cache_is_never_forgotten() {
    let disk = Arc::new(CachedDisk::default());
    StripedFile::format(disk.as_ref(), &header(None)).unwrap();
    let chain = open(&disk, None).unwrap();
    chain.write(&[1; 512], 0).unwrap();
    disk.set_fuse(0);
    assert!(chain.flush().is_err());
    disk.set_fuse(1000);
    assert!(chain.flush().is_err(), "the data may be gone");
    assert!(!chain.top().map_is_durable());
}

#[test]
fn a_stripe_that_could_not_be_written_stays_in_the_base() {
    let disk = Arc::new(CachedDisk::default());
    StripedFile::format(disk.as_ref(), &header(None)).unwrap();
    let chain = open(&disk, None).unwrap();
    disk.set_fuse(0);
    assert!(chain.write(&[1; 512], 0).is_err());
    disk.set_fuse(1000);
    chain.flush().unwrap();
    let mut found = [0; 512];
    open(&disk, None).unwrap().read(&mut found, SECTOR).unwrap();
    assert_eq!(found, stamp(BASE, 1));
}

#[test]
fn a_crash_test_that_finds_what_it_should() {
    // The model refuses a sector of another place, and a torn one.
    let disk = Arc::new(CachedDisk::default());
    StripedFile::format(disk.as_ref(), &header(None)).unwrap();
    let chain = open(&disk, None).unwrap();
    chain.write(&stamp(1, 5), 5 * SECTOR).unwrap();
    chain.flush().unwrap();
    let mut model = Model::default();
    model.possible(5).clear();
    model.add(5, stamp(1, 6));
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        check(&chain, &mut model, "wrong");
    }));
    assert!(checked.is_err());
    assert!(disk.operations() > 0);
}
