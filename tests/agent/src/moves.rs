//! The steps of a move at which tests kill or hold agents: names of failpoints.

/// Steps of the agent that a guest leaves, in their order.
pub const SOURCE_POINTS: [&str; 7] = [
    "leave-begun",
    "leave-loaded",
    "leave-released",
    "leave-backends-ended",
    "leave-flows-sent",
    "leave-moved",
    "leave-gone",
];
/// Steps of the agent that it comes to.
pub const DESTINATION_POINTS: [&str; 11] = [
    "arrive-folder-made",
    "arrive-machine-ready",
    "arrive-plan-written",
    "arrive-ticket-left",
    "arrive-said",
    "arrive-flows-taken",
    "land-begun",
    "land-backends-started",
    "land-ports-up",
    "land-resumed",
    "land-said",
];
