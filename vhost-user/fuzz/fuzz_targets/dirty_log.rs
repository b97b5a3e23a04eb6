//! The dirty log: any file, offset and length from the frontend, any addresses from the guest.
//! Each page that is marked is, and no byte outside the log is touched.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use keelson_blk::dirty_log::DirtyLog;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

const FILE: usize = 3 * 4096;

fuzz_target!(|input: &[u8]| {
    let Some((setup, marks)) = input.split_first_chunk::<20>() else {
        return;
    };
    let number = |place: usize| {
        u64::from_le_bytes(setup[place..place + 8].try_into().expect("eight bytes"))
    };
    // Mostly values that could be meant.
    let small = setup[16] & 1 == 0;
    let offset = if small { number(0) % 4 * 4096 } else { number(0) };
    let bytes = if small { number(8) % 8192 } else { number(8) };
    let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(FILE as u64).expect("three pages");
    let copy = file.try_clone().expect("a copy");
    let Ok(log) = DirtyLog::map(copy, offset, bytes) else {
        return;
    };
    let mut expected = vec![0_u8; FILE];
    for mark in marks.as_chunks::<12>().0 {
        let (address, len) = mark.split_at(8);
        let address = u64::from_le_bytes(address.try_into().expect("eight bytes"));
        let len = u64::from(u32::from_le_bytes(len.try_into().expect("four bytes")));
        let address = if mark[7] & 1 == 0 { address % (1 << 28) } else { address };
        log.mark(address, len);
        let Some(last) = address.checked_add(len.saturating_sub(1)) else {
            continue;
        };
        if len == 0 {
            continue;
        }
        for page in address / 4096..=(last / 4096).min(bytes * 8) {
            if page / 8 < bytes {
                expected[(offset + page / 8) as usize] |= 1 << (page % 8);
            }
        }
    }
    let mut found = vec![0; FILE];
    file.read_exact_at(&mut found, 0).expect("three pages");
    assert!(found == expected);
});
