//! Lets creatures meet in pairs at a mall, which each leaves in another colour: a game of messages between processes.
//!
//! Every creature is a process with a mailbox of its own, and so is the mall. A creature that wants to meet somebody writes to the mall, which
//! waits for a second one and tells each about the other. Messages are read where they lie. When all meetings have taken place, the mall tells every
//! creature so. At the end the meetings of all creatures add up to two for each meeting.
//!
//! Run it with `cargo run --release --example chameneos`.

#![allow(clippy::print_stdout)]

mod command_line;

use std::process::ExitCode;

use netmcore::prelude::*;
use serde::{Deserialize, Serialize};

const USAGE: &str = "\
Usage: chameneos [OPTIONS]

Lets creatures meet in pairs, by messages, and prints how many meetings each of them had.

Options:
  --meetings N            how many meetings take place (default 3000)
  --creatures N           how many creatures there are (default 4, at least 2)
  --socket-directory DIR  where the master keeps its record (default: a fresh directory, removed at the end)
  --help                  print this
";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ShmSafe, Serialize, Deserialize)]
enum Colour {
    Blue,
    Red,
    Yellow,
}

/// What creatures tell the mall, and what it tells them of each other.
#[derive(Clone, Copy, Debug, ShmSafe)]
struct Creature {
    number: usize,
    colour: Colour,
}

/// The answer of the mall: whom to meet; `None` when it closes.
type Meeting = Option<Creature>;
type Mall = ShmArc<Mailbox<Creature>>;
type Answers = ShmArc<Mailbox<Meeting>>;

/// What has become of a creature.
#[derive(Serialize, Deserialize)]
struct Life {
    meetings: u64,
    colour: Colour,
}

fn main() -> ExitCode {
    command_line::run(
        USAGE,
        |line| {
            let meetings: u64 = line.number("--meetings", ..)?.unwrap_or(3000);
            let creatures: usize = line.number("--creatures", 2..)?.unwrap_or(4);
            Ok((meetings, creatures))
        },
        |directory, (meetings, creatures)| Ok(chameneos(directory, meetings, creatures)?),
    )
}

fn chameneos(directory: &Path, meetings: u64, creatures: usize) -> netmcore::Result<()> {
    let mut master = Master::builder(directory);

    let creature = master.def_process(
        |(number, mut colour, mall, answers): (usize, Colour, Mall, Answers)| -> Life {
            let answers = answers.receiver().unwrap();
            let mut meetings = 0;
            loop {
                mall.send(Creature { number, colour }).unwrap();
                let Some(other) = *answers.recv().unwrap() else {
                    return Life { meetings, colour };
                };
                assert_ne!(other.number, number, "nobody meets itself");
                meetings += 1;
                colour = complement(colour, other.colour);
            }
        },
    );

    let mall = master.def_process(move |(mall, answers): (Mall, Vec<Answers>)| {
        let visitors = mall.receiver().unwrap();
        let next = || *visitors.recv().unwrap();
        for _ in 0..meetings {
            let (one, two) = (next(), next());
            answers[one.number].send(Some(two)).unwrap();
            answers[two.number].send(Some(one)).unwrap();
        }
        for _ in 0..creatures {
            answers[next().number].send(None).unwrap();
        }
    });

    let all = master.def_process(move |()| {
        let heap = shared_heap().unwrap();
        let at_the_mall: Mall =
            ShmArc::new_in(&heap, Mailbox::new_in(&heap, creatures).unwrap()).unwrap();
        let answers: Vec<Answers> = (0..creatures)
            .map(|_| ShmArc::new_in(&heap, Mailbox::new_in(&heap, 1).unwrap()).unwrap())
            .collect();
        let mall = mall.start(&(at_the_mall.clone(), answers.clone())).unwrap();
        let colours = [Colour::Blue, Colour::Red, Colour::Yellow];
        let running: Vec<Running<Life>> = (0..creatures)
            .map(|number| {
                let colour = colours[number % colours.len()];
                let argument = (number, colour, at_the_mall.clone(), answers[number].clone());
                creature.start(&argument).unwrap()
            })
            .collect();
        let mut total = 0;
        for (number, process) in running.into_iter().enumerate() {
            let life = process.join().unwrap();
            total += life.meetings;
            println!(
                "creature {number}: {} meetings, {:?} in the end",
                life.meetings, life.colour
            );
        }
        mall.join().unwrap();
        println!("{total} in all, two for each of {meetings} meetings");
        assert_eq!(total, 2 * meetings, "a message was lost or doubled");
    });

    master.run(&all, &())
}

/// The colour in which a creature leaves that meets another: its own if both are alike, else the one that neither has.
fn complement(own: Colour, other: Colour) -> Colour {
    use Colour::{Blue, Red, Yellow};
    match (own, other) {
        (Blue, Blue) | (Red, Yellow) | (Yellow, Red) => Blue,
        (Red, Red) | (Blue, Yellow) | (Yellow, Blue) => Red,
        (Yellow, Yellow) | (Blue, Red) | (Red, Blue) => Yellow,
    }
}
