#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

use proc_macro_crate::{FoundCrate, crate_name};
use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{
    Data, DeriveInput, Error, Fields, Index, LitStr, Path, Result, Token, WherePredicate,
    parse_macro_input, parse_quote,
};

/// Implements `ShmSafe` for a struct or an enum whose fields are all `ShmSafe`.
///
/// Each type parameter `T` gets the bound `T: ShmSafe`, as with the derives of std. Two attributes change the defaults:
///
/// * `#[shm_safe(crate = "some::path")]`: where the trait is. By default it is found in whichever of `netmcore-shm`, `netmcore` and
///   `netmcore-proc` the package depends on, under whatever name.
/// * `#[shm_safe(bound = "T: Send")]`: these bounds instead of the default ones; `""` for none.
///
/// Refused are unions, packed structs and types with lifetimes.
#[proc_macro_derive(ShmSafe, attributes(shm_safe))]
pub fn derive_shm_safe(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(input)
        .unwrap_or_else(|error| error.to_compile_error())
        .into()
}

/// What the attributes say.
#[derive(Default)]
struct Options {
    trait_is_in: Option<Path>,
    bounds: Option<Vec<WherePredicate>>,
}

fn expand(mut input: DeriveInput) -> Result<TokenStream> {
    refuse_what_cannot_be(&input)?;
    let options = options(&input)?;
    let shm = options.trait_is_in.unwrap_or_else(default_path);
    let name = &input.ident;

    let mut types = Vec::new();
    let visits = match &input.data {
        Data::Struct(data) => visit_fields_of_self(&data.fields, &shm, &mut types),
        Data::Enum(data) if data.variants.is_empty() => quote!(match *self {}),
        Data::Enum(data) => {
            let arms = data.variants.iter().map(|variant| {
                let pattern = &variant.ident;
                let (bindings, visits) = visit_fields_bound(&variant.fields, &shm, &mut types);
                quote!(Self::#pattern { #bindings } => { #visits })
            });
            let arms: Vec<_> = arms.collect();
            quote!(match self { #(#arms)* })
        }
        Data::Union(_) => TokenStream::new(),
    };
    let has_pointers = types
        .iter()
        .map(|field| quote_spanned!(field.span()=> || <#field as #shm::ShmSafe>::HAS_POINTERS));

    let bounds = options.bounds.unwrap_or_else(|| {
        let parameters = input.generics.type_params();
        parameters
            .map(|parameter| {
                let parameter = &parameter.ident;
                parse_quote!(#parameter: #shm::ShmSafe)
            })
            .collect()
    });
    input.generics.make_where_clause().predicates.extend(bounds);
    let (parameters, arguments, conditions) = input.generics.split_for_impl();
    Ok(quote! {
        // SAFETY: all fields are ShmSafe, which the bodies below demand, and report their pointers.
        #[automatically_derived]
        #[allow(unsafe_code, deprecated, clippy::undocumented_unsafe_blocks)]
        unsafe impl #parameters #shm::ShmSafe for #name #arguments #conditions {
            const HAS_POINTERS: bool = false #(#has_pointers)*;

            #[allow(unused_variables)]
            fn visit_pointers(&self, visit: &mut dyn ::core::ops::FnMut(*const u8)) {
                #visits
            }
        }
    })
}

fn refuse_what_cannot_be(input: &DeriveInput) -> Result<()> {
    if let Data::Union(data) = &input.data {
        return Err(Error::new(
            data.union_token.span,
            "a union cannot be ShmSafe by derive: which field it holds, and so its pointers, is not known; use an enum",
        ));
    }
    if let Some(lifetime) = input.generics.lifetimes().next() {
        return Err(Error::new(
            lifetime.span(),
            "a type with a lifetime cannot be ShmSafe: what it borrows belongs to one process; own the value, or store its index",
        ));
    }
    for attribute in &input.attrs {
        if attribute.path().is_ident("repr") {
            attribute.parse_nested_meta(|meta| {
                if meta.path.is_ident("packed") {
                    return Err(meta.error(
                        "a packed type cannot be ShmSafe by derive: there are no references to its fields",
                    ));
                }
                // align(8) and the like: not our subject.
                if meta.input.peek(syn::token::Paren) {
                    let inside;
                    syn::parenthesized!(inside in meta.input);
                    let _: TokenStream = inside.parse()?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn options(input: &DeriveInput) -> Result<Options> {
    let mut options = Options::default();
    for attribute in &input.attrs {
        if !attribute.path().is_ident("shm_safe") {
            continue;
        }
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("crate") {
                let value = meta.value()?;
                // In quotes as serde has it, or as it is.
                options.trait_is_in = Some(match value.peek(LitStr) {
                    true => value.parse::<LitStr>()?.parse_with(Path::parse_mod_style)?,
                    false => value.call(Path::parse_mod_style)?,
                });
                Ok(())
            } else if meta.path.is_ident("bound") {
                let text: LitStr = meta.value()?.parse()?;
                let bounds = text.parse_with(
                    syn::punctuated::Punctuated::<WherePredicate, Token![,]>::parse_terminated,
                )?;
                options.bounds = Some(bounds.into_iter().collect());
                Ok(())
            } else {
                Err(meta.error("expected `crate = \"some::path\"` or `bound = \"T: Bound\"`"))
            }
        })?;
    }
    Ok(options)
}

/// Where the caller's package has the trait from.
fn default_path() -> Path {
    path_among(|package| crate_name(package).ok())
}

/// The packages that have the trait, and where it is in them: the first that `find` knows.
fn path_among(find: impl Fn(&str) -> Option<FoundCrate>) -> Path {
    let homes = [
        ("netmcore-shm", "netmcore_shm", None),
        ("netmcore", "netmcore", Some("shm")),
        ("netmcore-proc", "netmcore_proc", None),
    ];
    for (package, itself, module) in homes {
        let name = match find(package) {
            None => continue,
            // Its tests and examples are crates of their own; in itself it is `extern crate self as …`.
            Some(FoundCrate::Itself) => itself.to_owned(),
            Some(FoundCrate::Name(name)) => name,
        };
        let name = syn::Ident::new(&name, Span::call_site());
        let module = module.map(|module| format_ident!("{module}")).into_iter();
        return parse_quote!(::#name #(::#module)*);
    }
    parse_quote!(::netmcore_shm)
}

/// The span of the type, so that the compiler's messages point there; but names mean what they mean in the method, also where the type was given to
/// the macro that the struct is written by.
fn messages_at(kind: &syn::Type) -> Span {
    kind.span().resolved_at(Span::call_site())
}

/// `visit_pointers` for each field of `self`; the fields' types are added to `types`.
fn visit_fields_of_self(fields: &Fields, shm: &Path, types: &mut Vec<syn::Type>) -> TokenStream {
    let visits = fields.iter().enumerate().map(|(index, field)| {
        let member = match &field.ident {
            Some(name) => quote!(#name),
            None => {
                let index = Index::from(index);
                quote!(#index)
            }
        };
        let kind = &field.ty;
        types.push(kind.clone());
        quote_spanned! { messages_at(kind)=>
            <#kind as #shm::ShmSafe>::visit_pointers(&self.#member, visit);
        }
    });
    visits.collect()
}

/// The same for a variant: its fields are bound by a pattern, which comes first.
fn visit_fields_bound(
    fields: &Fields,
    shm: &Path,
    types: &mut Vec<syn::Type>,
) -> (TokenStream, TokenStream) {
    let (mut bindings, mut visits) = (TokenStream::new(), TokenStream::new());
    for (index, field) in fields.iter().enumerate() {
        let binding = format_ident!("field_{index}");
        let kind = &field.ty;
        let member = match &field.ident {
            Some(name) => quote!(#name),
            None => {
                let index = Index::from(index);
                quote!(#index)
            }
        };
        types.push(kind.clone());
        bindings.extend(quote!(#member: #binding,));
        visits.extend(quote_spanned! { messages_at(kind)=>
            <#kind as #shm::ShmSafe>::visit_pointers(#binding, visit);
        });
    }
    (bindings, visits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(input: DeriveInput) -> String {
        expand(input).unwrap_err().to_string()
    }

    #[test]
    fn refusals_say_why() {
        let union = message(parse_quote!(union U { a: u8, b: u16 }));
        assert!(union.contains("use an enum"), "{union}");
        let borrowing = message(parse_quote!(
            struct S<'a>(&'a u8);
        ));
        assert!(borrowing.contains("lifetime"), "{borrowing}");
        let packed = message(parse_quote!(
            #[repr(C, packed(2))]
            struct S(u8);
        ));
        assert!(packed.contains("packed"), "{packed}");
        let unknown = message(parse_quote!(
            #[shm_safe(nonsense)]
            struct S(u8);
        ));
        assert!(unknown.contains("expected"), "{unknown}");
    }

    #[test]
    fn attributes_change_path_and_bounds() {
        let input = parse_quote! {
            #[repr(C, align(64))]
            #[shm_safe(crate = ::elsewhere::shm, bound = "T: Copy")]
            struct S<T>(T);
        };
        let expanded = expand(input).unwrap().to_string();
        assert!(expanded.contains(":: elsewhere :: shm :: ShmSafe for S < T > where T : Copy"));
        assert!(!expanded.contains("T : :: elsewhere"), "{expanded}");
    }

    #[test]
    fn path_may_stand_in_quotes() {
        let input = parse_quote! {
            #[shm_safe(crate = "::elsewhere::shm")]
            struct S(u8);
        };
        let expanded = expand(input).unwrap().to_string();
        assert!(expanded.contains("impl :: elsewhere :: shm :: ShmSafe for S"));
        let nonsense = message(parse_quote! {
            #[shm_safe(crate = "no path")]
            struct S(u8);
        });
        assert!(nonsense.contains("unexpected token"), "{nonsense}");
    }

    #[test]
    fn trait_is_found_through_any_package_that_has_it() {
        let path = |known: &[(&str, &str)]| {
            let find = |package: &str| {
                let found = known.iter().find(|(name, _)| *name == package)?;
                Some(match found.1 {
                    "" => FoundCrate::Itself,
                    name => FoundCrate::Name(name.to_owned()),
                })
            };
            let path = path_among(find);
            quote!(#path).to_string()
        };
        let shm = ("netmcore-shm", "netmcore_shm");
        let facade = ("netmcore", "multi");
        let proc = ("netmcore-proc", "netmcore_proc");
        assert_eq!(path(&[proc]), ":: netmcore_proc");
        assert_eq!(path(&[proc, facade]), ":: multi :: shm");
        assert_eq!(path(&[proc, facade, shm]), ":: netmcore_shm");
        assert_eq!(path(&[("netmcore-shm", "")]), ":: netmcore_shm");
        assert_eq!(path(&[]), ":: netmcore_shm");
    }

    #[test]
    fn default_bounds_leave_constants_alone() {
        let input = parse_quote!(
            struct S<T, const N: usize>([T; N])
            where
                T: Clone;
        );
        let expanded = expand(input).unwrap().to_string();
        assert!(expanded.contains("impl < T , const N : usize >"));
        assert!(expanded.contains("T : Clone , T : "), "{expanded}");
    }
}
