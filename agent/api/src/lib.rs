//! Keelson's objects, their validation, and the agent's gRPC interface.
