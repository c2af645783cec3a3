//! Prints what netmcore does: the `tracing` events of target `netmcore`, one line each, to standard error.
//!
//! For programs that have no subscriber of their own. Each event is written by one call, so the lines of the
//! master and its workers do not mix.
//!
//! **Not here:** the events themselves, which stand where things happen.

use std::fmt::{self, Write as _};
use std::io::Write as _;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Metadata, Subscriber};

/// Prints from now on what netmcore does in this process and in those forked from it: each event down to the level
/// `DEBUG`, with the time since boot and the Unix pid.
///
/// Returns false, and changes nothing, if the program has a `tracing` subscriber: the events of target `netmcore`,
/// down to `TRACE`, go there already.
///
/// ```
/// netmcore_proc::debug::enable();
/// ```
#[doc(alias = "Netmcore.Debug.enable")]
pub fn enable() -> bool {
    tracing::subscriber::set_global_default(Printer).is_ok()
}

struct Printer;

impl Subscriber for Printer {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "netmcore" && *metadata.level() <= LevelFilter::DEBUG
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn event(&self, event: &Event<'_>) {
        let line = line_of(event);
        // Whoever closed standard error does not want to read it.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    // netmcore has no spans.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn line_of(event: &Event<'_>) -> String {
    let mut fields = Fields::default();
    event.record(&mut fields);
    let now = netmcore_sys::futex::Deadline::after(std::time::Duration::ZERO).as_nanos();
    format!(
        "[{}.{:06}] netmcore {} {}: {}{}\n",
        now / 1_000_000_000,
        now / 1000 % 1_000_000,
        std::process::id(),
        event.metadata().level(),
        fields.message,
        fields.others,
    )
}

/// What an event says, and ` name=value` for each of its other fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.others, " {name}={value:?}"),
        };
        written.expect("writing to a string does not fail");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

    /// As the printer, but keeps the lines.
    struct Keeper;

    impl Subscriber for Keeper {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            Printer.enabled(metadata)
        }
        fn event(&self, event: &Event<'_>) {
            LINES.lock().unwrap().push(line_of(event));
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    #[test]
    fn event_becomes_one_line() {
        tracing::subscriber::with_default(Keeper, || {
            tracing::warn!(target: "netmcore", count = 3, path = "/x", "something {}", "odd");
            tracing::trace!(target: "netmcore", "too fine");
            tracing::error!(target: "another", "not ours");
        });
        let lines = LINES.lock().unwrap();
        let [line] = &lines[..] else {
            panic!("{lines:?}");
        };
        let (time, rest) = line.split_once("] ").unwrap();
        assert!(time.starts_with('['), "{line}");
        let expected = format!(
            "netmcore {} WARN: something odd count=3 path=\"/x\"\n",
            std::process::id()
        );
        assert_eq!(rest, expected);
    }
}
