//! What is asked of a disk.

/// Which operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Reads at random places.
    RandomRead,
    /// Writes at random places.
    RandomWrite,
    /// 70 reads for 30 writes, at random places.
    Mixed,
    /// Reads in order.
    SequentialRead,
    /// Writes in order.
    SequentialWrite,
}

/// Under the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backing {
    /// A file.
    File,
    /// A loop device over the same file.
    Loop,
    /// Nothing: it takes the disk out.
    Null,
}

/// A kind of load.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    pub pattern: Pattern,
    pub backing: Backing,
    /// Bytes of each operation.
    pub block: usize,
    /// Operations under way, over all queues.
    pub depth: usize,
    pub queues: usize,
}

impl Work {
    pub fn label(self) -> String {
        let pattern = match self.pattern {
            Pattern::RandomRead => "random read",
            Pattern::RandomWrite => "random write",
            Pattern::Mixed => "70/30 mix",
            Pattern::SequentialRead => "sequential read",
            Pattern::SequentialWrite => "sequential write",
        };
        let backing = match self.backing {
            Backing::File => "file",
            Backing::Loop => "loop device",
            Backing::Null => "null",
        };
        let queues = match self.queues {
            1 => String::new(),
            queues => format!(", {queues} queues"),
        };
        let kib = self.block / 1024;
        format!(
            "{backing}: {kib} KiB {pattern}, depth {}{queues}",
            self.depth
        )
    }
}

/// What is asked for once.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    pub write: bool,
    /// In bytes.
    pub offset: u64,
}

/// Chooses operations and places, the same ones for each peer.
#[derive(Debug)]
pub struct Operations {
    work: Work,
    blocks: u64,
    next: u64,
    random: u64,
}

impl Operations {
    /// On a disk of this many bytes.
    pub fn new(work: Work, bytes: u64) -> Self {
        Self {
            work,
            blocks: (bytes / work.block as u64).max(1),
            next: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// The next one.
    pub fn next(&mut self) -> Operation {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let random = self.random >> 16;
        let (write, block) = match self.work.pattern {
            Pattern::RandomRead => (false, random % self.blocks),
            Pattern::RandomWrite => (true, random % self.blocks),
            Pattern::Mixed => (self.random % 10 >= 7, random % self.blocks),
            Pattern::SequentialRead | Pattern::SequentialWrite => {
                self.next = (self.next + 1) % self.blocks;
                (self.work.pattern == Pattern::SequentialWrite, self.next)
            }
        };
        Operation {
            write,
            offset: block * self.work.block as u64,
        }
    }
}

/// The kinds of load of a quick run.
pub fn quick() -> Vec<Work> {
    let file = |pattern, depth| random(pattern, Backing::File, depth, 1);
    let null = |depth| random(Pattern::RandomRead, Backing::Null, depth, 1);
    vec![
        file(Pattern::RandomRead, 1),
        file(Pattern::RandomRead, 32),
        file(Pattern::RandomRead, 128),
        file(Pattern::RandomWrite, 32),
        null(1),
        null(32),
        null(128),
    ]
}

/// The kinds of load of a full run: on each backing every pattern, depth, size and number of queues,
/// though not each with each.
pub fn full() -> Vec<Work> {
    let mut works = Vec::new();
    for backing in [Backing::File, Backing::Loop, Backing::Null] {
        for pattern in [Pattern::RandomRead, Pattern::RandomWrite] {
            for depth in [1, 8, 32, 128] {
                works.push(random(pattern, backing, depth, 1));
            }
        }
        for queues in [2, 4] {
            works.push(random(Pattern::RandomRead, backing, 128, queues));
        }
        if backing == Backing::Null {
            continue;
        }
        let mixed = if backing == Backing::File {
            &[1, 8, 32, 128][..]
        } else {
            &[32][..]
        };
        for depth in mixed {
            works.push(random(Pattern::Mixed, backing, *depth, 1));
        }
        for pattern in [Pattern::SequentialRead, Pattern::SequentialWrite] {
            for block in [64 << 10, 1 << 20] {
                works.push(Work {
                    block,
                    ..random(pattern, backing, 8, 1)
                });
            }
        }
    }
    works.extend([2, 4].map(|queues| random(Pattern::RandomWrite, Backing::File, 128, queues)));
    works
}

fn random(pattern: Pattern, backing: Backing, depth: usize, queues: usize) -> Work {
    Work {
        pattern,
        backing,
        block: 4096,
        depth,
        queues,
    }
}
