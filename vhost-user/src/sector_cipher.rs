//! AES-XTS on sectors of 512 bytes, as dm-crypt's `aes-xts-plain64` does it (IEEE 1619).
//!
//! The key is 32 bytes for AES-128 or 64 for AES-256: the data key, then the tweak's key. A sector
//! whose encrypted bytes are all zero is a hole, and decrypts to zeroes: so discarded and never
//! written sectors read as zeroes. No written sector looks like that, but for a chance of 2⁻⁴⁰⁹⁶.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Deref;
use std::ptr::NonNull;

use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256, Block};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::overlay::header::KeyCheck;

/// The unit of encryption, in bytes.
pub const SECTOR_BYTES: usize = 512;
/// The longest key, in bytes.
pub const MAX_KEY: usize = 64;

/// A disk's key, expanded, in memory that is neither swapped nor dumped where the system allows
/// it, and is zeroed at the end.
pub struct SectorCipher(Locked<Secret>);

struct Secret {
    key: [u8; MAX_KEY],
    len: usize,
    xts: Xts,
}

// Not boxed further: all of it has to be in the locked page.
#[allow(clippy::large_enum_variant, reason = "there is one for each disk")]
enum Xts {
    /// The data's and the tweak's cipher.
    Aes128(Aes128, Aes128),
    Aes256(Aes256, Aes256),
}

const BLOCKS: usize = SECTOR_BYTES / 16;

/// Why bytes are no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It can't be read.
    #[error("can't read the key: {0}")]
    Io(#[from] io::Error),
    /// Neither 32 nor 64 bytes.
    #[error("the key has {0}; give 32 bytes for AES-128 or 64 for AES-256, and no newline")]
    Length(String),
    /// Both halves are the same.
    #[error("the two halves of the key are the same, which makes XTS insecure; use random bytes")]
    EqualHalves,
}

impl SectorCipher {
    /// Expands a key of 32 or 64 bytes.
    pub fn new(key: &[u8]) -> Result<Self, KeyError> {
        if !matches!(key.len(), 32 | 64) {
            return Err(KeyError::Length(format!("{} bytes", key.len())));
        }
        let (data, tweak) = key.split_at(key.len() / 2);
        if data == tweak {
            return Err(KeyError::EqualHalves);
        }
        let wrong = |_| KeyError::Length("a wrong length".into());
        let xts = if key.len() == 32 {
            let data = Aes128::new_from_slice(data).map_err(wrong)?;
            Xts::Aes128(data, Aes128::new_from_slice(tweak).map_err(wrong)?)
        } else {
            let data = Aes256::new_from_slice(data).map_err(wrong)?;
            Xts::Aes256(data, Aes256::new_from_slice(tweak).map_err(wrong)?)
        };
        let mut secret = Secret {
            key: [0; MAX_KEY],
            len: key.len(),
            xts,
        };
        secret.key[..key.len()].copy_from_slice(key);
        Ok(Self(Locked::new(secret)))
    }

    /// Reads a key to the end of a pipe or file.
    pub fn read_key(mut source: File) -> Result<Self, KeyError> {
        // One more, to notice that there is too much.
        let mut key = Zeroizing::new([0; MAX_KEY + 1]);
        let mut len = 0;
        while let Some(rest) = key.get_mut(len..).filter(|rest| !rest.is_empty()) {
            match source.read(rest) {
                Ok(0) => break,
                Ok(bytes) => len += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if len > MAX_KEY {
            return Err(KeyError::Length(format!("more than {MAX_KEY} bytes")));
        }
        Self::new(key.get(..len).unwrap_or_default())
    }

    /// Encrypts whole sectors in place; the first one is number `sector` of the disk.
    pub fn encrypt(&self, sector: u64, bytes: &mut [u8]) {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            match &self.0.xts {
                Xts::Aes128(data, tweak) => {
                    process_sector(bytes, &tweaks(tweak, number), |blocks| {
                        data.encrypt_blocks(blocks);
                    });
                }
                Xts::Aes256(data, tweak) => {
                    process_sector(bytes, &tweaks(tweak, number), |blocks| {
                        data.encrypt_blocks(blocks);
                    });
                }
            }
        }
    }

    /// Decrypts whole sectors in place; the first one is number `sector` of the disk.
    pub fn decrypt(&self, sector: u64, bytes: &mut [u8]) {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            match &self.0.xts {
                Xts::Aes128(data, tweak) => {
                    process_sector(bytes, &tweaks(tweak, number), |blocks| {
                        data.decrypt_blocks(blocks);
                    });
                }
                Xts::Aes256(data, tweak) => {
                    process_sector(bytes, &tweaks(tweak, number), |blocks| {
                        data.decrypt_blocks(blocks);
                    });
                }
            }
        }
    }

    /// How the key is recognized later, under a salt that should be random.
    pub fn key_check(&self, salt: [u8; 16]) -> KeyCheck {
        let key = self.0.key.get(..self.0.len).unwrap_or_default();
        let mut mac = [0; 32];
        if let Ok(mut hmac) = Hmac::<Sha256>::new_from_slice(key) {
            hmac.update(b"keelson-blk key check");
            hmac.update(&salt);
            mac.copy_from_slice(&hmac.finalize().into_bytes());
        }
        KeyCheck { salt, mac }
    }

    /// Whether this is the key that the check was made with.
    pub fn matches(&self, check: &KeyCheck) -> bool {
        self.key_check(check.salt) == *check
    }
}

// The tweak of each block of a sector: the sector's number as a little-endian number, encrypted
// ("plain64"), then doubled in GF(2¹²⁸) from block to block.
fn tweaks(cipher: &impl BlockCipherEncrypt<BlockSize = U16>, sector: u64) -> [u128; BLOCKS] {
    let mut block = Block::from(u128::from(sector).to_le_bytes());
    cipher.encrypt_block(&mut block);
    let mut tweak = u128::from_le_bytes(block.into());
    std::array::from_fn(|_| {
        let this = tweak;
        tweak = (tweak << 1) ^ (0x87 * (tweak >> 127));
        this
    })
}

// All blocks of the sector at once, so that the processor can work on several in parallel.
fn process_sector(bytes: &mut [u8], tweaks: &[u128; BLOCKS], cipher: impl FnOnce(&mut [Block])) {
    let (parts, _) = bytes.as_chunks_mut::<16>();
    let mut blocks = [Block::default(); BLOCKS];
    for ((block, part), tweak) in blocks.iter_mut().zip(parts.iter()).zip(tweaks) {
        *block = (u128::from_le_bytes(*part) ^ tweak).to_le_bytes().into();
    }
    cipher(&mut blocks);
    for ((block, part), tweak) in blocks.into_iter().zip(parts).zip(tweaks) {
        *part = (u128::from_le_bytes(block.into()) ^ tweak).to_le_bytes();
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SectorCipher(…)")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

// A value on pages of its own, locked into memory and left out of core dumps.
struct Locked<T> {
    pointer: NonNull<T>,
    layout: Layout,
}

// SAFETY: it owns the value, as a box does.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as a box, it gives out shared references only.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    const PAGE: usize = 4096;

    fn new(value: T) -> Self {
        let size = size_of::<T>().next_multiple_of(Self::PAGE).max(Self::PAGE);
        let layout = Layout::new::<T>()
            .align_to(Self::PAGE)
            .and_then(|layout| Layout::from_size_align(size, layout.align()))
            .unwrap_or(Layout::new::<T>());
        // SAFETY: the layout's size is not zero.
        let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout);
        };
        let pointer = memory.cast::<T>();
        // SAFETY: the pages were allocated above for this value alone, and are large enough and
        // aligned for it; both calls only change how the kernel treats them.
        unsafe {
            let address = memory.as_ptr().cast();
            if libc::mlock(address, layout.size()) != 0 {
                let error = io::Error::last_os_error();
                tracing::warn!(%error, "the key may be swapped out: its page can't be locked");
            }
            libc::madvise(address, layout.size(), libc::MADV_DONTDUMP);
            pointer.write(value);
        }
        Self { pointer, layout }
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: written by `new`, dropped only with self.
        unsafe { self.pointer.as_ref() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: the value is dropped once; its pages are this value's own, and are zeroed,
        // unlocked and freed with the layout that they were allocated with.
        unsafe {
            self.pointer.drop_in_place();
            let memory = self.pointer.as_ptr().cast::<u8>();
            std::slice::from_raw_parts_mut(memory, self.layout.size()).zeroize();
            libc::munlock(memory.cast(), self.layout.size());
            libc::madvise(memory.cast(), self.layout.size(), libc::MADV_DODUMP);
            dealloc(memory, self.layout);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits = hex.as_bytes().chunks(2);
        digits
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    // IEEE 1619-2007, annex B, vectors 4 and 10: a data unit of 512 bytes, 00 01 … ff 00 01 … ff.
    fn counting() -> Vec<u8> {
        (0..=255).cycle().take(512).collect()
    }

    #[test]
    fn ieee_1619_vector_4_aes_128() {
        let key = bytes("2718281828459045235360287471352631415926535897932384626433832795");
        let mut data = counting();
        SectorCipher::new(&key).unwrap().encrypt(0, &mut data);
        assert_eq!(
            data[..32],
            bytes("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c")
        );
        assert_eq!(
            data[480..],
            bytes("eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568")
        );
    }

    #[test]
    fn ieee_1619_vector_10_aes_256() {
        let key = bytes(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ));
        let mut data = counting();
        let cipher = SectorCipher::new(&key).unwrap();
        cipher.encrypt(0xff, &mut data);
        assert_eq!(
            data[..32],
            bytes("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
        );
        cipher.decrypt(0xff, &mut data);
        assert_eq!(data, counting());
    }

    #[test]
    fn sectors_are_as_another_implementation_has_them() {
        use xts_mode::{Xts128, get_tweak_default};
        let key = counting();
        for sector in [0, 1, 77, u64::from(u32::MAX), 1 << 40] {
            let mut ours: Vec<u8> = counting().repeat(3);
            let mut theirs = ours.clone();
            SectorCipher::new(&key[3..67])
                .unwrap()
                .encrypt(sector, &mut ours);
            let data = Aes256::new_from_slice(&key[3..35]).unwrap();
            let tweak = Aes256::new_from_slice(&key[35..67]).unwrap();
            Xts128::new(data, tweak).encrypt_area(
                &mut theirs,
                SECTOR_BYTES,
                u128::from(sector),
                get_tweak_default,
            );
            assert!(ours == theirs, "sector {sector}");
        }
    }

    #[test]
    fn a_hole_decrypts_to_zeroes_and_zeroes_encrypt_to_something_else() {
        let cipher = SectorCipher::new(&counting()[..64]).unwrap();
        let mut hole = vec![0; 1024];
        cipher.decrypt(7, &mut hole);
        assert_eq!(hole, vec![0; 1024]);
        cipher.encrypt(7, &mut hole);
        assert_ne!(hole[..512], hole[512..], "each sector has its own tweak");
        cipher.decrypt(7, &mut hole);
        assert_eq!(hole, vec![0; 1024]);
    }

    #[test]
    fn keys_of_wrong_length_or_with_equal_halves_are_refused() {
        for len in [0, 16, 31, 33, 48, 63, 65] {
            assert!(SectorCipher::new(&vec![1; len]).is_err(), "{len}");
        }
        let equal = SectorCipher::new(&[1; 64]).unwrap_err();
        assert!(matches!(equal, KeyError::EqualHalves));
    }

    #[test]
    fn the_right_key_is_recognized() {
        let one = SectorCipher::new(&counting()[..64]).unwrap();
        let other = SectorCipher::new(&counting()[1..65]).unwrap();
        let check = one.key_check([9; 16]);
        assert!(one.matches(&check));
        assert!(!other.matches(&check));
    }
}
