//! The words of a filter, one after another.

use std::{iter::Peekable, str::CharIndices};

use super::{FilterError, error};

/// A word of the language.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A field, or a value without quotes.
    Word(String),
    /// Between quotes, which are gone and so are the escapes.
    Quoted {
        quote: char,
        text: String,
    },
    /// A run of `=`, `!` and `~`.
    Operator(String),
    Comma,
    Dot,
    End,
}

pub(super) struct Scanner<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, rest: text.char_indices().peekable() }
    }

    /// Where the next character is, in bytes.
    pub(super) fn position(&mut self) -> usize {
        self.rest.peek().map_or(self.text.len(), |(position, _)| *position)
    }

    /// The next token where a field, a separator or an operator is expected, and its place.
    pub(super) fn next(&mut self) -> Result<(usize, Token), FilterError> {
        self.token(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    }

    /// The next token where a value is expected, and its place.
    pub(super) fn value(&mut self) -> Result<(usize, Token), FilterError> {
        self.token(|c| c != ',' && !c.is_whitespace() && !c.is_control())
    }

    fn token(&mut self, in_word: impl Fn(char) -> bool) -> Result<(usize, Token), FilterError> {
        self.take_while(char::is_whitespace);
        let position = self.position();
        let Some(&(_, first)) = self.rest.peek() else { return Ok((position, Token::End)) };
        let token = match first {
            '"' | '/' | '|' => Token::Quoted { quote: first, text: self.quoted(position)? },
            '=' | '!' | '~' => Token::Operator(self.take_while(|c| matches!(c, '=' | '!' | '~'))),
            ',' | '.' => {
                self.rest.next();
                if first == ',' { Token::Comma } else { Token::Dot }
            }
            first if in_word(first) => Token::Word(self.take_while(in_word)),
            other => return Err(error(position, format!("{other:?} does not belong here"))),
        };
        Ok((position, token))
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        std::iter::from_fn(|| self.rest.next_if(|(_, c)| wanted(*c))).map(|(_, c)| c).collect()
    }

    /// What is between this quote and the next of its kind. Escapes may name single bytes, which must make up text.
    fn quoted(&mut self, start: usize) -> Result<String, FilterError> {
        let quote = self.rest.next().map(|(_, c)| c);
        let mut bytes = Vec::new();
        loop {
            match self.rest.next().map(|(_, c)| c) {
                None | Some('\n' | '\0') => return Err(error(start, "the quotes are not closed")),
                Some('\\') => self.escape(start, quote, &mut bytes)?,
                end if end == quote => break,
                Some(c) => push(&mut bytes, c),
            }
        }
        String::from_utf8(bytes).map_err(|_| error(start, "what is quoted is not UTF-8"))
    }

    /// One escape of Go's strings, behind its backslash.
    fn escape(&mut self, start: usize, quote: Option<char>, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let unknown = || error(start, "an escape that Go does not know");
        let kind = self.rest.next().map(|(_, c)| c).ok_or_else(unknown)?;
        match kind {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            '\\' => bytes.push(b'\\'),
            kind if Some(kind) == quote => push(bytes, kind),
            'x' => bytes.push(u8::try_from(self.digits(16, 2).ok_or_else(unknown)?).map_err(|_| unknown())?),
            'u' | 'U' => {
                let code = self.digits(16, if kind == 'u' { 4 } else { 8 });
                push(bytes, code.and_then(char::from_u32).ok_or_else(unknown)?);
            }
            first => {
                let high = first.to_digit(8).ok_or_else(unknown)?;
                let code = high << 6 | self.digits(8, 2).ok_or_else(unknown)?;
                bytes.push(u8::try_from(code).map_err(|_| unknown())?);
            }
        }
        Ok(())
    }

    /// A number of so many digits.
    fn digits(&mut self, radix: u32, count: u32) -> Option<u32> {
        (0..count).try_fold(0u32, |number, _| {
            let digit = self.rest.next()?.1.to_digit(radix)?;
            number.checked_mul(radix)?.checked_add(digit)
        })
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}
