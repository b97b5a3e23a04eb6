//! Tells aya that the types may be copied to and from maps byte by byte.

use aya::Pod;

use crate::{
    CounterKey, DirectionTallies, FlowKey, FlowState, FragmentKey, PolicyEntry, PortKey, SourceKey,
};

/// Each type is `repr(C)`, made of integers only, without padding, as the sizes prove.
macro_rules! pod {
    ($($name:ty = $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: integers without padding: every byte is initialised and any bytes are valid.
            unsafe impl Pod for $name {}
        )*
    };
}

pod! {
    CounterKey = 8,
    DirectionTallies = 528,
    FlowKey = 20,
    FlowState = 16,
    FragmentKey = 16,
    PolicyEntry = 40,
    PortKey = 8,
    SourceKey = 8,
}
