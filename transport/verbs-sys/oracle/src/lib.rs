//! Nothing but tests (`tests/`): layouts and constants of our bindings, compared with those other crates make of the headers
//! at hand. The lists of what is compared are read off our bindings by `build.rs`, so that nothing can be forgotten.
